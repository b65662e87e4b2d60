"""A trained model in a program of one's own: images to latents and back, samples by class name.

    from unite_fast import load

    model = load("runs/pets")                                    # or an export, a checkpoint, an official .pt
    images = model.sample(["dog", "cat"], seeds=[0, 1])          # PIL images
    latents = model.encode(images)                               # (2, K, C); files, PIL, arrays and tensors will do
    again = model.decode(latents)                                # PIL images
    between = model.decode(latents.lerp(latents.flip(0), 0.5))

``model.network`` is the torch module, whose sizes are ``model.network.config``; ``model.how`` is how it samples.
"""

from unite_fast.library.model import Model, load

__all__ = ["Model", "load"]
