"""A pipeline of diffusers for an export of unite-fast, which it needs; ``export`` writes this file as pipeline.py.

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipe(["dog", "cat"], seeds=[0, 1]).images

FOLDER is an export, or the name of a repository on the hub that holds one. Seen with diffusers 0.42.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ImagePipelineOutput


class UnitePipeline(DiffusionPipeline):
    """``model`` is the ``unite_fast.Model``, loaded when it is first needed, to a GPU where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def folder(self) -> str:
        """The export that this pipeline was made from, fetched where it is a repository."""
        place = str(self.config["_name_or_path"])
        if not Path(place).is_dir():
            from huggingface_hub import snapshot_download

            place = snapshot_download(place)
        return place

    def load(self) -> Any:
        """The model of that export."""
        if self.model is None:
            from unite_fast.library import load

            self.model = load(self.folder())
        return self.model

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Copies the export: its weights are no component that diffusers knows."""
        shutil.copytree(self.folder(), save_directory, dirs_exist_ok=True)

    def __call__(self, labels: Any = None, seeds: Any = None, output_type: str = "pil", **options: Any) -> Any:
        """As ``Model.sample``: classes by name or number, a seed per image; options: solver, steps, cfg_scale.

        output_type: pil, np (float32 (B, S, S, Q) in [0, 1]), or pt (float32 (B, Q, S, S)).
        """
        images = self.load().sample(labels, seeds, "pil" if output_type == "pil" else "tensor", **options)
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images)
