"""Write the UNet of Stable Diffusion 1 as `unet.safetensors`, with the names of refiners.

python scripts/convert-sd-unet-weights.py --from stable-diffusion-v1-5 --output-file unet.safetensors
"""

from refiners.cli.convert import run_part_script

run_part_script("unet", "unet.safetensors")
