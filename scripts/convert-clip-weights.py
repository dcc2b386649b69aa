"""Write the text encoder of Stable Diffusion 1 as `CLIPTextEncoderL.safetensors`, with the names of refiners.

python scripts/convert-clip-weights.py --from stable-diffusion-v1-5 --output-file CLIPTextEncoderL.safetensors
"""

from refiners.cli.convert import run_part_script

run_part_script("clip_text_encoder", "CLIPTextEncoderL.safetensors")
