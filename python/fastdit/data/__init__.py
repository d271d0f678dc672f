"""Captioned clips to train on: a built-in renderer of moving shapes, folders of videos, captions and their reader."""

from fastdit.data.captions import WORDS, expand
from fastdit.data.clip import Clip, collate, to_frames, to_video
from fastdit.data.detect import Found, detect
from fastdit.data.folder import VideoFolder
from fastdit.data.media import read, write
from fastdit.data.shapes import Scene, Shapes, render

__all__ = [
    "WORDS",
    "Clip",
    "Found",
    "Scene",
    "Shapes",
    "VideoFolder",
    "collate",
    "detect",
    "expand",
    "read",
    "render",
    "to_frames",
    "to_video",
    "write",
]
