"""A pipeline of diffusers for an export of unite-fast, which it needs; ``export`` writes this file as pipeline.py.

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
images = pipe(["dog", "cat"], seeds=[0, 1]).images

Written to the documented interface of diffusers; its test runs only where diffusers is installed, and has not run yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ImagePipelineOutput


class UnitePipeline(DiffusionPipeline):
    """``model`` is the ``unite_fast.Model``, loaded when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def load(self) -> Any:
        """The model of the folder, or of the repository, that this pipeline was made from."""
        if self.model is None:
            from unite_fast.library import load

            place = str(self.config["_name_or_path"])
            if not Path(place).is_dir():
                from huggingface_hub import snapshot_download

                place = snapshot_download(place)
            self.model = load(place)
        return self.model

    def __call__(self, labels: Any = None, seeds: Any = None, output_type: str = "pil", **options: Any) -> Any:
        """As ``Model.sample``: classes by name or number, a seed per image; options: solver, steps, cfg_scale."""
        form: Any = {"pil": "pil", "np": "array", "pt": "tensor"}[output_type]
        return ImagePipelineOutput(images=self.load().sample(labels, seeds, form, **options))
