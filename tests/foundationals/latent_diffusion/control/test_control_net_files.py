"""ControlNets in files: every key of the full sizes, each form, folders of diffusers, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from control_specimens import (
    CHANNELS,
    SD1,
    SPECS,
    control_pair,
    inputs,
    predict,
    predict_theirs,
    randomize,
    relative_error,
    their_control_net,
    unet_pair,
    way_down,
)
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor

from refiners.foundationals.latent_diffusion import UNet, UNetSpec
from refiners.foundationals.latent_diffusion.control import (
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    control_net_files,
    load_control_net,
    save_control_net,
)
from refiners.foundationals.latent_diffusion.control.control_net_names import diffusers_names, single_file_names
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, SDXL_UNET
from refiners.weights.files import write_safetensors
from refiners.weights.formats import Content, Family, identify


def saved(control_net: ControlNet, form: str, folder: Path) -> Path:
    """A file or folder in one of the forms."""
    if form in ("folder", "single.safetensors"):
        save_control_net(control_net, folder / form)
        return folder / form
    path = folder / form
    tensors: dict[str, Tensor] = control_net.state_dict()
    if form == "original.pth":
        names = single_file_names(control_net.spec)
        torch.save({f"control_model.{names.to_theirs(key)}": tensor for key, tensor in tensors.items()}, path)
    else:
        names = diffusers_names(control_net.spec)
        is_ours = form == "ours.safetensors"
        write_safetensors(path, {key if is_ours else str(names.to_theirs(key)): t for key, t in tensors.items()})
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "family"), [(SD1_UNET, Family.SD1), (SDXL_UNET, Family.SDXL)], ids=["SD1", "SDXL"])
def test_every_key_of_the_full_size_has_its_place_in_both_forms(spec: UNetSpec, family: Family) -> None:
    with torch.device("meta"):
        theirs = their_control_net(spec, ControlNetSpec().condition_channels).state_dict()
    own = ControlNetSpec(spec)
    ours: dict[str, Tensor] = ControlNet(own, device="meta").state_dict()
    names, original = diffusers_names(own), single_file_names(own)
    assert {names.to_theirs(key) for key in ours} == set(theirs)
    for key, tensor in ours.items():
        assert theirs[str(names.to_theirs(key))].shape == tensor.shape
        for form in (names, original):
            assert form.to_ours(str(form.to_theirs(key))) == key
    originals = {f"control_model.{original.to_theirs(key)}": tuple(tensor.shape) for key, tensor in ours.items()}
    assert len(originals) == len(ours)
    for shapes in (originals, {key: tuple(tensor.shape) for key, tensor in theirs.items()}):
        identity = identify(shapes)
        assert (identity.content, identity.family) == (Content.CONTROLNET, family)


def test_the_original_names_are_those_of_the_authors() -> None:
    names = single_file_names(ControlNetSpec())
    keys = {str(names.to_theirs(key)) for key in ControlNet(device="meta").state_dict()}
    hints = {f"input_hint_block.{index}.weight" for index in range(0, 15, 2)}
    zeros = {f"zero_convs.{index}.0.bias" for index in range(12)}
    others = {"middle_block_out.0.weight", "time_embed.2.bias", "input_blocks.0.0.weight", "input_blocks.3.0.op.weight"}
    assert hints | zeros | others <= keys
    assert not [key for key in keys if key.startswith(("output_blocks", "out."))]


FORMS = ["folder", "single.safetensors", "original.pth", "diffusers.safetensors", "ours.safetensors"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_form_loads_to_the_same_weights(spec: UNetSpec, form: str, tmp_path: Path) -> None:
    control_net, _ = control_pair(spec)
    adapter = ControlNetAdapter(UNet(spec, dtype=torch.float64), saved(control_net, form, tmp_path))
    loaded = adapter.control_net
    assert loaded.spec == control_net.spec and loaded.dtype == torch.float64
    for key, tensor in control_net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].float(), tensor), key


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_diffusers_loads_what_is_saved_and_the_other_way_round(spec: UNetSpec, tmp_path: Path) -> None:
    ours, _ = control_pair(spec, global_pool_conditions=True)
    save_control_net(ours, tmp_path / "ours")
    theirs: Any = ControlNetModel.from_pretrained(tmp_path / "ours")
    names = diffusers_names(ours.spec)
    assert theirs.config.global_pool_conditions
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[str(names.to_ours(key))]), key
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_control_net(tmp_path / "theirs", UNet(spec)).spec == ours.spec


SMALL = {
    "small": replace(SPECS["SDXL"], transformer_layers=(0, 0, 0), middle_layers=0),
    "mid": replace(SPECS["SDXL"], transformer_layers=(0, 1, 1)),
    "only in the middle": replace(SPECS["SDXL"], transformer_layers=(0, 0, 0), middle_layers=2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_one_with_fewer_transformers_than_the_unet_is_told_by_its_file_and_equals_diffusers(
    spec: UNetSpec, form: str, tmp_path: Path
) -> None:
    control_net, their_control = control_pair(spec)
    unet, theirs = unet_pair(SPECS["SDXL"])
    if form == "folder":
        their_control.save_pretrained(tmp_path / "folder")
    path = tmp_path / "folder" if form == "folder" else saved(control_net, form, tmp_path)
    adapter = ControlNetAdapter(unet, path, scale=0.7).inject()
    assert adapter.control_net.spec == control_net.spec
    arguments = inputs(SPECS["SDXL"])
    adapter.set_controlnet_condition(arguments[-1])
    with torch.no_grad():
        expected = predict_theirs(theirs, [(their_control, 0.7)], *arguments)
        assert relative_error(predict(unet, *arguments), expected) < 1e-5
        adapter.eject()
        assert relative_error(predict(unet, *arguments), expected) > 1e-3


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_diffusers_loads_a_saved_one_with_fewer_transformers(spec: UNetSpec, tmp_path: Path) -> None:
    ours, _ = control_pair(spec)
    save_control_net(ours, tmp_path)
    theirs: Any = ControlNetModel.from_pretrained(tmp_path)
    assert {str(diffusers_names(ours.spec).to_theirs(key)) for key in ours.state_dict()} == set(theirs.state_dict())


def test_a_repository_of_the_hub_is_read_with_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_net, _ = control_pair(SD1)
    save_control_net(control_net, tmp_path / "snapshot")

    def fetch_from_hub(repository: str) -> Callable[[str], Path | None]:
        return partial(found, tmp_path / "snapshot" if repository == "someone/edges-1.0" else tmp_path)

    def found(folder: Path, name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    monkeypatch.setattr(control_net_files, "fetch_from_hub", fetch_from_hub)
    assert load_control_net("someone/edges-1.0", UNet(SD1)).spec == control_net.spec
    with pytest.raises(FileNotFoundError, match="someone/else: there are no weights"):
        load_control_net("someone/else", UNet(SD1))
    with pytest.raises(FileNotFoundError, match=r"models/none\.safetensors"):
        load_control_net("models/none.safetensors", UNet(SD1))


def test_a_configuration_tells_sizes_that_are_not_those_of_the_unet(tmp_path: Path) -> None:
    shallow = replace(SD1, transformer_layers=(0, 1, 0))
    control_net, _ = control_pair(shallow)
    save_control_net(control_net, tmp_path / "shallow")
    unet, _ = unet_pair(SD1)
    adapter = ControlNetAdapter(unet, tmp_path / "shallow").inject()
    assert adapter.control_net.spec.unet == shallow
    arguments = inputs(SD1)
    adapter.set_controlnet_condition(arguments[-1])
    with torch.no_grad():
        assert predict(unet, *arguments).isfinite().all()


def test_one_of_an_inpainting_model_has_its_own_number_of_channels(tmp_path: Path) -> None:
    control_net, _ = control_pair(SD1)
    save_control_net(control_net, tmp_path / "four.safetensors")
    unet = UNet(replace(SD1, in_channels=9, guidance_waves=12))
    assert load_control_net(tmp_path / "four.safetensors", unet).spec == control_net.spec


def full_size(spec: UNetSpec, folder: Path) -> Path:
    """A file with the names of a ControlNet of that family, and no more of it than tells what it is."""
    width, path = spec.text_dim, folder / "control.safetensors"
    names = ("input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.1.1.attn2.to_k.weight")
    write_safetensors(path, {f"control_model.{name}": torch.zeros(1, width) for name in names})
    return path


@pytest.mark.parametrize(("file", "model"), [(SD1_UNET, SDXL_UNET), (SDXL_UNET, SD1_UNET)], ids=["SD1", "SDXL"])
def test_one_of_another_family_is_refused_with_both_named(file: UNetSpec, model: UNetSpec, tmp_path: Path) -> None:
    families = {768: "Stable Diffusion 1", 2048: "Stable Diffusion XL"}
    with pytest.raises(ValueError, match="get one that was made for it") as caught:
        load_control_net(full_size(file, tmp_path), UNet(model, device="meta"))
    assert all(family in str(caught.value) for family in families.values())


def without(path: Path, key: str) -> None:
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))


def test_a_folder_that_is_not_whole_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load_control_net(tmp_path / "empty", UNet(SD1))
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_control_net(tmp_path / "nothing.safetensors", UNet(SD1))
    save_control_net(control_pair(SD1)[0], tmp_path / "folder")
    without(tmp_path / "folder" / "config.json", "block_out_channels")
    with pytest.raises(ValueError, match=r"config\.json.*block_out_channels"):
        load_control_net(tmp_path / "folder", UNet(SD1))
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_control_net(tmp_path / "folder", UNet(SD1))


@pytest.mark.parametrize(
    ("option", "value"),
    [("controlnet_conditioning_channel_order", "bgr"), ("conditioning_channels", 4), ("_class_name", "UNet2DModel")],
)
def test_an_option_that_we_do_not_have_is_refused_by_name(option: str, value: object, tmp_path: Path) -> None:
    save_control_net(control_pair(SD1)[0], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), option: value}))
    with pytest.raises(ValueError, match=f"{value}"):
        load_control_net(tmp_path, UNet(SD1))


def test_a_file_of_something_else_is_told_by_what_it_is(tmp_path: Path) -> None:
    names = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "x.lora_up.weight"}
    write_safetensors(tmp_path / "lora.safetensors", {name: torch.zeros(1, 1) for name in names})
    with pytest.raises(ValueError, match="no ControlNet, but LoRA"):
        load_control_net(tmp_path / "lora.safetensors", UNet(SD1))


@pytest.mark.parametrize("lost", ["down_blocks.1.attentions", "down_blocks.2.attentions", "mid_block.attentions"])
def test_one_without_the_transformers_of_one_level_is_not_taken_for_a_small_one(lost: str, tmp_path: Path) -> None:
    tensors = their_control_net(SPECS["SDXL"]).state_dict()
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    write_safetensors(tmp_path / "file.safetensors", whole)
    with pytest.raises(ValueError, match=rf"are missing \(first: '{lost}\.0\.norm\.weight'\)"):
        load_control_net(tmp_path / "file.safetensors", UNet(SPECS["SDXL"]))


def test_one_for_several_kinds_of_pictures_is_refused_for_that(tmp_path: Path) -> None:
    options = {"num_trans_channel": 16, "num_proj_channel": 16, "num_trans_head": 2, **way_down(SPECS["SDXL"])}
    theirs: Any = ControlNetUnionModel(conditioning_embedding_out_channels=CHANNELS, **options)
    theirs.save_pretrained(tmp_path)
    for where in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match="this is a ControlNet-Union, which is told by a number what kind"):
            load_control_net(where, UNet(SPECS["SDXL"]))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "NaN"])
def test_each_key_that_does_not_fit_is_named(change: str, tmp_path: Path) -> None:
    control_net = ControlNet(ControlNetSpec(SD1, CHANNELS))
    randomize(control_net)
    names = diffusers_names(control_net.spec)
    tensors = {str(names.to_theirs(key)): tensor for key, tensor in control_net.state_dict().items()}
    key = "mid_block.resnets.0.norm1.weight"
    changed = {"missing": None, "unknown": None, "shape": torch.zeros(3), "NaN": tensors[key] * torch.nan}[change]
    value = tensors.pop(key)
    if change != "missing":
        tensors[f"{key}_2" if change == "unknown" else key] = value if changed is None else changed
    write_safetensors(tmp_path / "file.safetensors", tensors)
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.norm1\.weight"):
        load_control_net(tmp_path / "file.safetensors", UNet(SD1))
