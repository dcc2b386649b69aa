"""Files of every kind of update, written by the tools that train them, and whether our models compute what theirs do.

The tools adapt diffusers' UNet and transformers' text encoder, and save what they learned; alphas are not the ranks.
"""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lora_specimens import Models, assert_changed, assert_same, load_both, outputs, their_outputs
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    GloraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor

from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.weights.lora_keys import Kind

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.kohya import PRESET, create_network

RANK, ALPHA = 4, 1.5
BLOCKS = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D", "TimestepEmbedding"]
# Their own preset has the time embedding twice.
SPARING = {
    "enable_conv": True,
    "unet_target_module": BLOCKS,
    "unet_target_name": ["conv_in", "conv_out"],
    "text_encoder_target_module": ["CLIPEncoderLayer"],
    "target_module": [*BLOCKS, "CLIPEncoderLayer"],
    "target_name": ["conv_in", "conv_out"],
}
PRESET["sparing"] = SPARING
logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # it reports at length
# The options of LyCORIS, and which kinds of updates are then in the file.
LYCORIS: dict[str, tuple[dict[str, Any], set[Kind]]] = {
    "LoCon": ({"algo": "locon"}, {Kind.LORA}),
    "LoCon, Tucker": ({"algo": "locon", "use_tucker": True}, {Kind.LORA}),
    "LoCon, rank-stabilised": ({"algo": "locon", "rs_lora": True}, {Kind.LORA}),
    "LoCon, learned scale": ({"algo": "locon", "use_scalar": True}, {Kind.LORA}),
    "LoCon and norms": ({"algo": "locon", "train_norm": True}, {Kind.LORA, Kind.NORM}),
    "DoRA": ({"algo": "locon", "dora_wd": True}, {Kind.DORA}),
    "DoRA of inputs": ({"algo": "locon", "dora_wd": True, "wd_on_output": False}, {Kind.DORA}),
    "LoHa": ({"algo": "loha"}, {Kind.LOHA}),
    "LoHa, Tucker": ({"algo": "loha", "use_tucker": True}, {Kind.LOHA}),
    "LoHa in a DoRA": ({"algo": "loha", "dora_wd": True}, {Kind.DORA}),
    "LoKr": ({"algo": "lokr"}, {Kind.LOKR}),
    "LoKr of four factors": ({"algo": "lokr", "decompose_both": True, "factor": 4}, {Kind.LOKR}),
    "LoKr of whole matrices": ({"algo": "lokr", "full_matrix": True}, {Kind.LOKR}),
    "LoKr, Tucker": ({"algo": "lokr", "use_tucker": True, "factor": 2}, {Kind.LOKR}),
    "LoKr in a DoRA": ({"algo": "lokr", "dora_wd": True}, {Kind.DORA}),
    "full difference": ({"algo": "full", "train_norm": True}, {Kind.DIFFERENCE, Kind.NORM}),
    "OFT with a limit": ({"algo": "diag-oft", "constraint": 0.5}, {Kind.OFT}),
    "OFT with scales": ({"algo": "diag-oft", "rescaled": True}, {Kind.OFT}),
    "BOFT": ({"algo": "boft"}, {Kind.OFT}),
    "BOFT with scales": ({"algo": "boft", "rescaled": True}, {Kind.OFT}),
    "GLoRA": ({"algo": "glora"}, {Kind.GLORA}),
    "(IA)^3": ({"algo": "ia3"}, {Kind.IA3}),
}
LINEAR = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"], "text_encoder": ["q_proj", "v_proj", "fc1"]}
ALL = {**LINEAR, "unet": [*LINEAR["unet"], "proj_in", "conv1", "conv_shortcut"]}
FEED_FORWARD = ["ff.net.2", "fc1"]
# peft's settings. OFT has no convolutions: where there is a kernel, peft's forward pass is not what it merges.
PEFT: dict[str, tuple[Callable[[list[str]], Any], dict[str, list[str]]]] = {
    "LoRA": (lambda names: LoraConfig(r=3, lora_alpha=5, target_modules=names), ALL),
    "LoRA, patterns": (
        lambda names: LoraConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=names,
            rank_pattern={"to_q": 2, "q_proj": 4},
            alpha_pattern={"to_k": 7, "fc1": 2},
        ),
        ALL,
    ),
    "DoRA": (lambda names: LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=names), ALL),
    "LoHa": (lambda names: LoHaConfig(r=3, alpha=5, target_modules=names, alpha_pattern={"to_q": 2, "fc1": 4}), ALL),
    "LoHa, Tucker": (lambda names: LoHaConfig(r=3, alpha=5, target_modules=names, use_effective_conv2d=True), ALL),
    "LoKr": (lambda names: LoKrConfig(r=3, alpha=5, target_modules=names), ALL),
    "LoKr, Tucker": (
        lambda names: LoKrConfig(r=3, alpha=5, target_modules=names, use_effective_conv2d=True, decompose_factor=2),
        ALL,
    ),
    "LoKr of four factors": (
        lambda names: LoKrConfig(r=2, alpha=5, target_modules=names, decompose_both=True, decompose_factor=8),
        ALL,
    ),
    "LoKr of whole matrices": (
        lambda names: LoKrConfig(
            r=64, alpha=96, target_modules=names, rank_pattern={"to_v": 80}, alpha_pattern={"to_q": 32, "q_proj": 32}
        ),
        ALL,
    ),
    "GLoRA": (lambda names: GloraConfig(r=3, target_modules=names), LINEAR),
    "GLoRA of vectors": (
        lambda names: GloraConfig(target_modules=names, config_A_B="vector", config_C="vector", config_D_E="vector"),
        LINEAR,
    ),
    "GLoRA of numbers": (
        lambda names: GloraConfig(target_modules=names, config_A_B="constant", config_C="none"),
        LINEAR,
    ),
    "GLoRA of biases": (lambda names: GloraConfig(r=2, target_modules=names, config_A_B="none"), LINEAR),
    "OFT": (lambda names: OFTConfig(r=0, oft_block_size=8, target_modules=names), LINEAR),
    "OFT, one block for all": (
        lambda names: OFTConfig(r=0, oft_block_size=8, target_modules=names, block_share=True),
        LINEAR,
    ),
    "OFT, exact": (
        lambda names: OFTConfig(r=0, oft_block_size=8, target_modules=names, use_cayley_neumann=False),
        LINEAR,
    ),
    "OFT with a limit": (
        lambda names: OFTConfig(r=0, oft_block_size=8, target_modules=names, coft=True, eps=0.8),
        LINEAR,
    ),
    "BOFT": (
        lambda names: BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=names),
        ALL,
    ),
    "(IA)^3": (
        lambda names: IA3Config(
            target_modules=names, feedforward_modules=[name for name in names if name in FEED_FORWARD]
        ),
        ALL,
    ),
}

WITH_EMBEDDING = {"unet": ["to_q"], "text_encoder": ["token_embedding", "q_proj"]}
PEFT |= {
    "LoRA of an embedding": (lambda names: LoraConfig(r=3, lora_alpha=5, target_modules=names), WITH_EMBEDDING),
    "DoRA of an embedding": (
        lambda names: LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=names),
        WITH_EMBEDDING,
    ),
    "AdaLoRA": (lambda names: AdaLoraConfig(init_r=5, lora_alpha=7, total_step=9, target_modules=names), ALL),
    "(IA)^3 of inputs as many as outputs": (
        lambda names: IA3Config(target_modules=names, feedforward_modules=[name for name in names if name == "conv2"]),
        {"unet": ["conv1", "conv2"], "text_encoder": ["fc1"]},
    ),
}
# What our files hold as differences: they compute the same, and are not the same bit by bit.
WHOLE: dict[str, tuple[Callable[[list[str]], Any], dict[str, list[str]]]] = {
    "LoRA and all biases": (lambda names: LoraConfig(r=3, lora_alpha=5, bias="all", target_modules=names), ALL),
    "norms": (
        lambda names: LNTuningConfig(target_modules=names),
        {"unet": ["norm1", "conv_norm_out"], "text_encoder": ["layer_norm1"]},
    ),
    "LoRA and whole layers": (
        lambda names: LoraConfig(r=3, target_modules=names[:2], modules_to_save=names[2:]),
        {"unet": ["to_q", "proj_in", "conv_out", "norm1"], "text_encoder": ["q_proj", "fc1", "final_layer_norm"]},
    ),
    "LoRA with biases": (
        lambda names: LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=names),
        {"unet": ["to_out.0", "proj_in", "conv1"], "text_encoder": ["q_proj", "fc1"]},
    ),
}


def randomise(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


def lycoris_file(pipeline: Any, path: Path, options: dict[str, Any]) -> Path:
    """Adapt UNet and text encoder with LyCORIS as kohya's scripts do, and save it."""
    torch.manual_seed(0)
    unet, text = pipeline.unet, pipeline.text_encoder
    network: Any = create_network(1.0, RANK, ALPHA, None, text, unet, preset="sparing", **options)
    network.apply_to(text, unet, True, True)
    randomise(network.parameters())
    arguments = {name: str(value) for name, value in options.items()}
    network.save_weights(str(path), torch.float32, {"ss_network_args": json.dumps(arguments)})  # as kohya's scripts
    return path


def peft_folder(pipeline: Any, path: Path, kind: str) -> Path:
    """Adapt UNet and text encoder with peft, and save a folder for each."""
    torch.manual_seed(0)
    configure, targets = (PEFT | WHOLE)[kind]
    for component, names in targets.items():
        adapted: Any = get_peft_model(getattr(pipeline, component), configure(names))
        randomise(parameter for parameter in adapted.parameters() if parameter.requires_grad)
        adapted.eval().save_pretrained(path / component)
    return path


def assert_computes_the_same(models: Models, path: Path) -> set[Kind]:
    """Which kinds of updates there are."""
    ours, theirs = models
    before, expected = outputs(ours), their_outputs(theirs)
    assert_changed(before, expected)
    report = LoraWeights(path, name="new").patch(ours)
    assert not report.left_out
    assert_same(outputs(ours), expected)
    return {update.kind for update in report.attached}


def peft_outputs(folder: Path) -> tuple[Tensor, Tensor]:
    """Of a fresh pipeline with the adapters of a folder."""
    _, pipeline = load_both()
    for component in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(pipeline, component), str(folder / component))
    return their_outputs(pipeline)
