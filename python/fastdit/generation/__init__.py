"""Text to video with a trained checkpoint: `Generator.load().generate("a red circle moving up on a blue background")`.

`python -m fastdit.generation.judge` measures how well a checkpoint follows its prompts.
"""

from fastdit.generation.generator import Generator

__all__ = ["Generator"]
