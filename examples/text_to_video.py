"""Make a clip of a prompt with the shipped checkpoint, and let the detector say what it shows.

python examples/text_to_video.py
"""

from fastdit.data import media
from fastdit.data.detect import detect
from fastdit.generation import Generator

generator = Generator.load()  # Generator.load("out/shapes") takes what `fastdit train` wrote
clip = generator.generate("a red circle moving right on a blue background", seed=1)
media.write("out/clip.mp4", clip.frames, clip.fps)

frames, height, width = clip.size
seen = detect(clip.frames)
print(f"{frames} frames of {height}x{width}: a {seen.colour} {seen.shape} moving {seen.motion} on {seen.background}")
