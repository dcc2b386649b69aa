"""Files of every kind of update of LyCORIS: our models compute what it does, and write the same bits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_specimens import Models, assert_changed, assert_same, load_both, outputs, their_outputs
from lycoris.wrapper import create_lycoris
from peer_files import (
    ALPHA,
    LYCORIS,
    RANK,
    assert_computes_the_same,
    create_network,
    lycoris_file,
    peft_outputs,
    randomise,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from refiners.foundationals.clip import CLIPTextEncoderL
from refiners.foundationals.latent_diffusion import UNet
from refiners.foundationals.latent_diffusion.lora import LoraWeights, compare_loras, convert_lora, save_lora
from refiners.foundationals.latent_diffusion.lora.places import find_layers
from refiners.foundationals.latent_diffusion.lora.weights import assign_updates, fitted_update
from refiners.weights.files import read_safetensors
from refiners.weights.lora_keys import Kind, LoraFile

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # LyCORIS' own warnings


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


@pytest.mark.parametrize("options", [{"algo": "lokr", "full_matrix": True}, {"algo": "glora"}])
def test_rank_stabilised_updates_are_as_strong_as_in_training(
    models: Models, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = lycoris_file(models[1], tmp_path / "a.safetensors", options | {"rs_lora": True})
    assert_computes_the_same(models, source)
    save_lora(tmp_path / "b.safetensors", models[0])
    fresh, _ = load_both()
    LoraWeights(tmp_path / "b.safetensors").patch(fresh)
    assert_same(outputs(fresh), outputs(models[0]))


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
