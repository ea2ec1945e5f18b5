"""Use a patch with nothing but diffusers: load it, draw, take it off.

python examples/02_plain_diffusers.py runs/example-erase
"""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import esd_lora

patch = Path(sys.argv[1])
emoji = Path(esd_lora.__file__).parent / "emoji" / "base"  # any folder or Hub id of the patch's base
pipe = StableDiffusionPipeline.from_pretrained(emoji, dtype=torch.float32)
pipe.load_lora_weights(patch, weight_name="pytorch_lora_weights.safetensors")

generator = torch.Generator().manual_seed(0)
pipe("a clock in sticker style", num_inference_steps=20, guidance_scale=7.5, generator=generator).images[0].save(
    patch / "erased.png"
)
pipe.unload_lora_weights()
generator = torch.Generator().manual_seed(0)
pipe("a clock in sticker style", num_inference_steps=20, guidance_scale=7.5, generator=generator).images[0].save(
    patch / "back.png"
)
print(f"see {patch}/erased.png and {patch}/back.png")
