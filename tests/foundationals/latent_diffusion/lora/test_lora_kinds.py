"""Files of every kind of update, written by the tools that train them: our models then compute what theirs do.

The tools adapt diffusers' UNet and transformers' text encoder, and save what they learned; alphas are not the ranks.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lora_specimens import Models, assert_changed, assert_same, load_both, outputs, their_outputs, write
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from refiners.foundationals.clip import CLIPTextEncoderL
from refiners.foundationals.latent_diffusion import UNet
from refiners.foundationals.latent_diffusion.lora import (
    LoraWeights,
    compare_loras,
    convert_lora,
    inspect_lora,
    save_lora,
)
from refiners.foundationals.latent_diffusion.lora.places import find_layers
from refiners.foundationals.latent_diffusion.lora.weights import assign_updates, fitted_update
from refiners.weights.files import read_safetensors
from refiners.weights.lora_keys import Kind, LoraFile

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    from lycoris.kohya import PRESET, create_network
    from lycoris.wrapper import create_lycoris
    from peft import (
        AdaLoraConfig,
        BOFTConfig,
        HRAConfig,
        IA3Config,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        OFTConfig,
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
    )

pytestmark = pytest.mark.slow
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
    "LoRA and whole layers": (
        lambda names: LoraConfig(r=3, target_modules=names[:2], modules_to_save=names[2:]),
        {"unet": ["to_q", "proj_in", "conv_out", "norm1"], "text_encoder": ["q_proj", "fc1", "final_layer_norm"]},
    ),
    "LoRA with biases": (
        lambda names: LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=names),
        {"unet": ["to_out.0", "proj_in", "conv1"], "text_encoder": ["q_proj", "fc1"]},
    ),
}


@pytest.fixture
def models() -> Models:
    return load_both()


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers asks for a newer peft than there is here; LyCORIS reports at length."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.20.0")
    monkeypatch.setitem(PRESET, "sparing", SPARING)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


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


def stored(path: Path) -> dict[str, Tensor]:
    """The tensors but alphas, whose form is free, by names with the part that newer releases leave out."""
    names = {key: key.replace("lora_te_encoder", "lora_te_text_model_encoder") for key in read_safetensors(path)}
    return {names[key]: tensor for key, tensor in read_safetensors(path).items() if not key.endswith(".alpha")}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_computes_the_same_and_every_bit_comes_back(models: Models, tmp_path: Path, kind: str) -> None:
    options, kinds = LYCORIS[kind]
    source = lycoris_file(models[1], tmp_path / "a.safetensors", options)
    assert assert_computes_the_same(models, source) == kinds
    save_lora(tmp_path / "b.safetensors", models[0])
    first, second = stored(source), stored(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor.squeeze(), second[key].squeeze()), key  # a 1x1 kernel may be left out
    comparison = compare_loras(source, tmp_path / "b.safetensors", load_both()[0])
    assert comparison.equal_count == len(comparison.layers) >= 133


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("algo", ["locon", "lokr", "full"])
def test_files_of_the_wrapper_of_lycoris(models: Models, tmp_path: Path, component: str, algo: str) -> None:
    ours, theirs = models
    before = outputs(ours)
    torch.manual_seed(0)
    network: Any = create_lycoris(
        getattr(theirs, component), 1.0, RANK, ALPHA, algo=algo, preset="sparing", warn_on_unmatched=False
    )
    network.apply_to()
    randomise(network.parameters())
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    report = LoraWeights(tmp_path / "a.safetensors").patch(ours)
    expected = their_outputs(theirs)
    assert_changed(before, expected, component)
    assert_same(outputs(ours), expected)
    assert len(report.attached) == len(network.loras) and not report.left_out


@pytest.mark.parametrize("kind", PEFT)
def test_peft_computes_the_same_and_our_files_do_too(models: Models, tmp_path: Path, kind: str) -> None:
    source = peft_folder(models[1], tmp_path / "a", kind)
    assert_computes_the_same(models, source)
    save_lora(tmp_path / "b.safetensors", models[0])
    fresh, _ = load_both()
    LoraWeights(tmp_path / "b.safetensors").patch(fresh)
    assert_same(outputs(fresh), outputs(models[0]))
    comparison = compare_loras(source, tmp_path / "b.safetensors", load_both()[0])
    assert comparison.equal_count == len(comparison.layers)


@pytest.mark.parametrize("kind", WHOLE)
def test_biases_and_whole_layers_of_peft_compute_the_same(models: Models, tmp_path: Path, kind: str) -> None:
    source = peft_folder(models[1], tmp_path / "a", kind)
    kinds = assert_computes_the_same(models, source)
    assert kinds == {Kind.LORA, Kind.DIFFERENCE if kind == "LoRA with biases" else Kind.WHOLE}
    save_lora(tmp_path / "b.safetensors", models[0])
    fresh, _ = load_both()
    before = outputs(fresh)
    weights = LoraWeights(tmp_path / "b.safetensors")
    weights.patch(fresh)
    assert_same(outputs(fresh), outputs(models[0]))
    weights.eject()
    assert all(torch.equal(*pair) for pair in zip(outputs(fresh), before, strict=True))
    if Kind.WHOLE in kinds:
        with pytest.raises(ValueError, match="has a whole weight or bias, and files hold differences"):
            convert_lora(source, tmp_path / "c.safetensors", fresh)


def test_ranks_that_adalora_took_away_are_gone(models: Models, tmp_path: Path) -> None:
    _, theirs = models
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=5, lora_alpha=7, total_step=9, target_modules=["to_q", "conv1"])
    adapted: Any = get_peft_model(theirs.unet, config)
    randomise(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    values = {name: value for name, value in adapted.base_model.model.named_parameters() if "lora_E" in name}
    kept = {name: [(index + line) % 3 > 1 for line in range(5)] for index, name in enumerate(values)}
    kept[next(iter(kept))] = [False] * 5
    with torch.no_grad():
        for name, value in values.items():
            value[[not each for each in kept[name]]] = 0
    config.rank_pattern = kept
    adapted.eval().save_pretrained(tmp_path / "unet")
    ours, before, expected = models[0], outputs(models[0]), their_outputs(theirs)
    report = LoraWeights(tmp_path).patch(ours)
    assert_changed(before, expected, "unet")
    assert_same(outputs(ours), expected)
    assert {update.rank for update in report.attached} <= {1, 2} and len(report.attached) == len(kept) - 1


def test_the_weights_of_a_peft_folder_stand_for_all_of_it(models: Models, tmp_path: Path) -> None:
    source = peft_folder(models[1], tmp_path / "a", "LoRA")
    for path in (source / "unet", source / "unet/adapter_model.safetensors"):
        weights = LoraWeights(path)
        assert {update.alpha for update in weights.patch(models[0]).attached} == {5}
        weights.eject()


def test_an_adapter_of_peft_that_is_of_no_known_kind_is_called_by_its_type(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    get_peft_model(theirs.unet, HRAConfig(r=4, target_modules=["to_q"])).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="a is an adapter of peft's HRA; nothing of it can be attached"):
        LoraWeights(tmp_path / "a").patch(ours)
    text = str(inspect_lora(tmp_path / "a", ours))
    assert "  peft's HRA, which cannot be loaded" in text and "and peft's HRA cannot be loaded" in text


def test_a_whole_model_is_no_adapter(models: Models, tmp_path: Path) -> None:
    ours, theirs = models
    path = write(tmp_path / "unet.safetensors", theirs.unet.state_dict())
    with pytest.raises(ValueError, match="is no LoRA but UNet"):
        LoraWeights(path).patch(ours, strict=False)


def test_a_rank_stabilised_lokr_of_whole_matrices_is_as_strong_as_in_training(models: Models, tmp_path: Path) -> None:
    source = lycoris_file(models[1], tmp_path / "a.safetensors", {"algo": "lokr", "full_matrix": True, "rs_lora": True})
    assert assert_computes_the_same(models, source) == {Kind.LOKR}
    save_lora(tmp_path / "b.safetensors", models[0])
    fresh, _ = load_both()
    LoraWeights(tmp_path / "b.safetensors").patch(fresh)
    assert_same(outputs(fresh), outputs(models[0]))


@pytest.mark.parametrize("kind", PEFT)
def test_peft_computes_the_same_from_the_folders_that_we_write(models: Models, tmp_path: Path, kind: str) -> None:
    source = peft_folder(models[1], tmp_path / "a", kind)
    expected = their_outputs(models[1])
    LoraWeights(source).patch(models[0])
    save_lora(tmp_path / "b", models[0], format="peft")
    assert_same(peft_outputs(tmp_path / "b"), expected)


@pytest.mark.parametrize(
    "kind",
    ["LoCon", "LoCon, rank-stabilised", "LoHa", "LoHa, Tucker", "LoKr", "LoKr of whole matrices", "LoKr, Tucker"],
)
def test_peft_computes_what_lycoris_does_from_the_folders_that_we_write(
    models: Models, tmp_path: Path, kind: str
) -> None:
    options, _ = LYCORIS[kind]
    source = lycoris_file(models[1], tmp_path / "a.safetensors", options)
    expected = their_outputs(models[1])
    convert_lora(source, tmp_path / "b", models[0], "peft")
    assert_same(peft_outputs(tmp_path / "b"), expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LoCon, Tucker", "has the core of a Tucker decomposition: peft cannot hold that, write kohya's form"),
        ("LoCon and norms", "is a norm difference: peft"),
        ("DoRA of inputs", "is a DoRA with a magnitude for each input: peft"),
        ("LoHa in a DoRA", "is a DoRA of a LoHa: peft"),
        # peft does not put the smaller one first
        ("LoKr of four factors", r"unet\.DownBlocks\.Chain_1\.Conv2d has a first matrix of \(4, 1\), and no factor"),
        ("OFT with a limit", "is an OFT that turns outputs, where peft turns inputs: peft"),
        ("BOFT", "is an OFT that turns outputs, where peft turns inputs: peft"),
        ("GLoRA", "is a GLoRA: peft"),
        ("(IA)^3", r"is an \(IA\)\^3 that leaves out the bias, where peft has it: peft"),
    ],
)
def test_what_peft_cannot_hold_is_refused(models: Models, tmp_path: Path, kind: str, message: str) -> None:
    options, _ = LYCORIS[kind]
    source = lycoris_file(models[1], tmp_path / "a.safetensors", options)
    with pytest.raises(ValueError, match=message):
        convert_lora(source, tmp_path / "b", models[0], "peft")
    assert not (tmp_path / "b").exists()


def peft_outputs(folder: Path) -> tuple[Tensor, Tensor]:
    """Of a fresh pipeline with the adapters of a folder."""
    _, pipeline = load_both()
    for component in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(pipeline, component), str(folder / component))
    return their_outputs(pipeline)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_dora_is_written_as_peft_has_it(models: Models, tmp_path: Path, form: str) -> None:
    peft_folder(models[1], tmp_path / "a", "DoRA")
    assert_computes_the_same(models, tmp_path / "a")
    save_lora(tmp_path / "b", models[0], format=form)
    ours = read_safetensors(tmp_path / "b/unet/adapter_model.safetensors" if form == "peft" else tmp_path / "b")
    theirs = read_safetensors(tmp_path / "a/unet/adapter_model.safetensors")
    for key, tensor in theirs.items():
        name = key if form == "peft" else f"unet.{key.removeprefix('base_model.model.')}"
        assert torch.equal(ours[name], tensor), key


@pytest.mark.parametrize("use_dora", [True, False])
def test_files_of_diffusers(models: Models, tmp_path: Path, use_dora: bool) -> None:
    _, theirs = models
    torch.manual_seed(0)
    layers: dict[str, Any] = {}
    for component, names in ALL.items():
        model = getattr(theirs, component)
        config = LoraConfig(r=3, lora_alpha=5, use_dora=use_dora, target_modules=names)
        model.add_adapter(config)
        randomise(parameter for name, parameter in model.named_parameters() if "lora_" in name)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    assert assert_computes_the_same(models, tmp_path) == {Kind.DORA if use_dora else Kind.LORA}


# LyCORIS needs the values of the weights for DoRA and full differences; their shapes say nothing new.
@pytest.mark.parametrize("kind", [kind for kind, (_, kinds) in LYCORIS.items() if not kinds & {Kind.DORA, Kind.NORM}])
def test_every_key_of_the_full_size_finds_its_layer(kind: str) -> None:
    with torch.device("meta"):
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        text = CLIPTextModel(CLIPTextConfig(**sizes))
        unet = UNet2DConditionModel(cross_attention_dim=768)
    options, kinds = LYCORIS[kind]
    rank = 32 if "BOFT" in kind else RANK  # smaller blocks do not divide 768 as a butterfly needs it
    network: Any = create_network(1.0, rank, ALPHA, None, text, unet, preset="sparing", **options)
    network.apply_to(text, unet, True, True)
    model: Any = SimpleNamespace(unet=UNet(device="meta"), clip_text_encoder=CLIPTextEncoderL(device="meta"))
    layers = find_layers(model)
    contents = assign_updates(LoraFile(Path("a"), network.state_dict(), {}, {}), model, layers)
    assert not contents.left_out
    fitted = [fitted_update(update, layers[update.place.path].module) for update in contents.updates]
    assert {update.shown_kind for update in fitted} == kinds
    assert len(fitted) == 282 + 72
