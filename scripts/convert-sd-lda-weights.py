"""Write the autoencoder of Stable Diffusion 1 as `lda.safetensors`, with the names of refiners.

python scripts/convert-sd-lda-weights.py --from stable-diffusion-v1-5 --output-file lda.safetensors
"""

from refiners.cli.convert import run_part_script

run_part_script("lda", "lda.safetensors")
