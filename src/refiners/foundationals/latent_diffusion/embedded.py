"""The embedded model: Stable Diffusion 1's classes over a small spec, with weights that come with the package.

It draws scenes (`refiners.foundationals.scenes`) of 32 x 32 pixels from captions such as "a red circle above a blue
square". docs/embedded.md tells how it was made and how well it does.
"""

from pathlib import Path

from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, CLIPTextSpec
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.foundationals.latent_diffusion.unet import UNetSpec
from refiners.solvers.params import ModelPredictionType, SolverParams, TimestepSpacing

FOLDER = Path(__file__).parent / "embedded_model"
# Keys are ours, after "unet.", "lda." and "clip_text_encoder."; half precision.
EMBEDDED_WEIGHTS = FOLDER / "weights.safetensors"
EMBEDDED_VOCABULARY = FOLDER / "vocabulary.txt"

EMBEDDED_AUTOENCODER = AutoencoderSpec(channels=(16, 32, 64), blocks_per_level=1, norm_groups=8, latent_scale=1.0)
EMBEDDED_TEXT_ENCODER = CLIPTextSpec(
    embedding_dim=128,
    max_sequence_length=32,
    vocabulary_size=806,
    num_layers=2,
    num_attention_heads=4,
    feedforward_dim=512,
    use_quick_gelu=True,
)
EMBEDDED_UNET = UNetSpec(
    channels=(64, 128),
    transformer_layers=(1, 1),
    num_heads=(4, 4),
    blocks_per_level=1,
    text_dim=EMBEDDED_TEXT_ENCODER.embedding_dim,
    norm_groups=16,
    position_frequencies=4,
)
# The first step starts from noise alone, so training has to end there too: no signal is left in the last timestep.
EMBEDDED_SOLVER_PARAMS = SolverParams(
    model_prediction_type=ModelPredictionType.VELOCITY,
    rescale_to_zero_terminal_snr=True,
    timesteps_spacing=TimestepSpacing.TRAILING,
)
EMBEDDED = StableDiffusionSpec(
    unet=EMBEDDED_UNET,
    autoencoder=EMBEDDED_AUTOENCODER,
    text_encoder=EMBEDDED_TEXT_ENCODER,
    solver_params=EMBEDDED_SOLVER_PARAMS,
    default_size=32,
    condition_scale=2.0,
    vocabulary=EMBEDDED_VOCABULARY,
)


def make_text_encoder() -> CLIPTextEncoder:
    """The text encoder of the embedded model, with its own vocabulary and without its weights."""
    length = EMBEDDED_TEXT_ENCODER.max_sequence_length
    return CLIPTextEncoder(EMBEDDED_TEXT_ENCODER, CLIPTokenizer(EMBEDDED_VOCABULARY, sequence_length=length))
