"""Models from files and to files: what is loaded is what was saved; what does not fit is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusion_specimens import SMALL, small_folder, small_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import SD1, StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.files import single_file
from refiners.foundationals.latent_diffusion.files.single_file import LEFTOVERS


@pytest.fixture(scope="module")
def model() -> StableDiffusion_1:
    return small_model()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("saved") / "sd")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "sd"))


@pytest.fixture
def file(model: StableDiffusion_1, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sd.safetensors")
    return tmp_path / "sd.safetensors"


def load(path: Path) -> StableDiffusion_1:
    return StableDiffusion_1.from_pretrained(path, spec=None if path.is_dir() else SMALL)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


# -- what is there is loaded


def test_a_folder_gives_back_the_model_and_its_spec(model: StableDiffusion_1, saved: Path) -> None:
    loaded = load(saved)
    assert_same(loaded, model)
    assert loaded.spec == SMALL


def test_a_single_file_gives_back_the_model(model: StableDiffusion_1, file: Path) -> None:
    assert_same(load(file), model)


def test_a_ckpt_file_gives_back_the_model(model: StableDiffusion_1, file: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(file), "global_step": 840000}, tmp_path / "sd.ckpt")
    assert_same(load(tmp_path / "sd.ckpt"), model)


def test_diffusers_loads_our_folder(model: StableDiffusion_1, saved: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(saved)
    theirs = {**pipeline.unet.state_dict(), **pipeline.vae.state_dict(), **pipeline.text_encoder.state_dict()}
    assert len(theirs) == len(model.state_dict())
    assert pipeline.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    ids = list(json.loads((saved / "tokenizer" / "vocab.json").read_text(encoding="utf-8")).values())
    assert ids == list(range(49408))  # in order, so that the same model always gives the same files
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_we_load_the_folder_that_diffusers_writes(model: StableDiffusion_1, saved: Path, tmp_path: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(saved)
    pipeline.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")
    assert_same(loaded, model)
    assert loaded.spec == SMALL


def test_diffusers_knows_every_name_of_our_single_file(tmp_path: Path) -> None:
    full = StableDiffusion_1(device="meta").state_dict()
    names = single_file.names(SD1)
    original = {str(names.to_theirs(name)) for name in full}
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    ours = {name: torch.zeros(()) for name in original}
    with torch.device("meta"):
        unet, vae = (
            UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
            AutoencoderKL.from_config(AutoencoderKL.load_config(_vae_config(tmp_path))),
        )
    config = dict(unet.config)
    assert convert_ldm_unet_checkpoint(dict(ours), config).keys() == unet.state_dict().keys()
    squeezed = {name: torch.zeros(1, 1, 1, 1) for name in original}
    assert convert_ldm_vae_checkpoint(squeezed, dict(vae.config)).keys() == vae.state_dict().keys()
    text = convert_ldm_clip_checkpoint(dict(ours))
    assert {name.removeprefix("text_model.") for name in text} == {
        name.removeprefix("cond_stage_model.transformer.text_model.")
        for name in original
        if name.startswith("cond_stage_model")
    }


def _vae_config(folder: Path) -> Path:
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("cls", [StableDiffusion_1, StableDiffusion_1_Inpainting])
def test_both_forms_hold_both_kinds_of_model(cls: type[StableDiffusion_1], tmp_path: Path) -> None:
    model = small_model(cls)
    model.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "file.safetensors")
    assert_same(cls.from_pretrained(tmp_path / "folder"), model)
    assert_same(cls.from_pretrained(tmp_path / "file.safetensors", spec=model.spec), model)


def test_half_files_load_in_any_dtype(model: StableDiffusion_1, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "half.safetensors").values())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loaded = StableDiffusion_1.from_pretrained(tmp_path / "half.safetensors", dtype=dtype, spec=SMALL)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        name, tensor = next(iter(model.state_dict().items()))
        assert torch.equal(loaded.state_dict()[name], tensor.half().to(dtype))


def test_an_adapted_model_saves_what_is_below(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    linear, parent = next(model.unet.walk(nn.Linear))
    LoraAdapter(linear, rank=2).inject(parent)
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), load(saved))


def test_older_names_of_the_autoencoder_are_read(folder: Path, model: StableDiffusion_1) -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            new = name
            for ours, theirs in older.items():
                new = new.replace(f".{ours}.", f".{theirs}.")
            tensors[new] = tensors.pop(name)

    change(folder / "vae/diffusion_pytorch_model.safetensors", rename)
    assert_same(load(folder), model)


def test_a_text_encoder_without_its_level_is_read(folder: Path, file: Path, model: StableDiffusion_1) -> None:
    def lift(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "text_model." in name]:
            tensors[name.replace("text_model.", "")] = tensors.pop(name)

    change(folder / "text_encoder/model.safetensors", lift)
    change(file, lift)
    assert_same(load(folder), model)
    assert_same(load(file), model)


def test_leftovers_of_training_are_dropped(file: Path, model: StableDiffusion_1) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: torch.zeros(3) for name in LEFTOVERS if name not in ("model_ema", "first_stage_model.loss")}
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]

    change(file, add)
    assert_same(load(file), model)


def test_torch_files_shards_and_half_variants_are_found(folder: Path, model: StableDiffusion_1) -> None:
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, unet.parent / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (unet.parent / f"{unet.name}.index.json").write_text(json.dumps(index))
    unet.unlink()
    text = folder / "text_encoder/model.safetensors"
    torch.save(load_file(text), folder / "text_encoder/pytorch_model.bin")
    text.unlink()
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_suffix(".fp16.safetensors"))
    assert_same(load(folder), model)


def test_shards_of_a_half_variant_are_found(folder: Path, model: StableDiffusion_1) -> None:
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    theirs.save_pretrained(folder / "unet", variant="fp16", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.fp16-*.safetensors"))) > 1
    assert_same(load(folder), model)


def test_a_folder_tells_its_prediction_and_schedule(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    params = load(folder).solver.params
    assert (params.model_prediction_type, params.rescale_to_zero_terminal_snr) == ("v_prediction", True)


@pytest.mark.slow
def test_every_key_of_the_full_size_has_its_place_in_both_forms() -> None:
    ours = StableDiffusion_1(device="meta").state_dict()
    names = single_file.names(SD1)
    theirs = {str(names.to_theirs(name)) for name in ours}
    assert len(ours) == len(theirs) == 686 + 248 + 196
    assert {names.to_ours(name) for name in theirs} == set(ours)


# -- what does not fit is refused, with the reason


def test_missing_extra_misshapen_and_broken_tensors_are_named_together(file: Path) -> None:
    name = "model.diffusion_model.out.2.bias"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.diffusion_model.out.3.bias"] = tensors.pop(name)
        tensors["model.diffusion_model.time_embed.0.bias"] = torch.zeros(3)
        tensors["first_stage_model.quant_conv.bias"][0] = torch.nan

    change(file, spoil)
    with pytest.raises(ValueError, match=r"sd.safetensors: ") as error:
        load(file)
    text = str(error.value)
    assert f"1 tensors have no place (first: 'model.diffusion_model.out.3.bias', the nearest is '{name}')" in text
    assert f"1 are missing (first: '{name}')" in text
    assert "'model.diffusion_model.time_embed.0.bias' is (3,) and should be (128,)" in text
    assert "1 hold NaN or infinite values (first: 'first_stage_model.quant_conv.bias')" in text


@pytest.mark.parametrize(
    ("part", "what"),
    [("model.diffusion_model", "UNet"), ("first_stage_model", "autoencoder"), ("cond_stage_model", "text encoder")],
)
def test_a_file_without_one_of_the_parts_is_refused(file: Path, part: str, what: str) -> None:
    change(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(part)])
    with pytest.raises(ValueError, match=f"no whole Stable Diffusion 1, as there is no {what} in it"):
        load(file)


@pytest.mark.parametrize(
    ("config", "entry", "value", "message"),
    [
        ("unet", "addition_embed_type", "image", "addition_embed_type is 'image', which this model cannot be"),
        ("unet", "transformer_layers_per_block", [1, 2], r"missing \(first: 'mid_block.*blocks.1\."),
        ("unet", "time_cond_proj_dim", 8, r"1 are missing \(first: 'time_embedding.cond_proj.weight'\)"),
        ("vae", "shift_factor", 0.1, "shift_factor is 0.1"),
        ("text_encoder", "model_type", "t5", "model_type is 't5'"),
        ("text_encoder", "hidden_size", 48, "text of width 32, but the text encoder gives 48"),
    ],
)
def test_a_folder_of_another_kind_of_model_is_refused(
    folder: Path, config: str, entry: str, value: Any, message: str
) -> None:
    path = folder / config / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_damaged_folders_are_refused(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config.json: this is not JSON"):
        load(folder)
    (folder / "vae/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a config.json has no entry 'block_out_channels'"):
        load(folder)
    (folder / "vae/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no vae/config.json"):
        load(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights, such as unet/diffusion_pytorch_model.safetensors"):
        load(folder)


def test_files_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8, 1, 1)}, tmp_path / "lora")
    (tmp_path / "lora").rename(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no UNet, no autoencoder, no text encoder in it, but LoRA"):
        StableDiffusion_1.from_pretrained(tmp_path / "lora.safetensors")


def test_truncated_files_and_files_with_code_are_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load(file)

    torch.save({"state_dict": {"a": print}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="wants to run code"):
        load(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("where", ["no/such/folder", Path("nowhere"), "nowhere", "/nowhere", "./nowhere", "~/nowhere"])
def test_what_is_not_there_is_refused(where: Any) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder, no file, no repository"):
        StableDiffusion_1.from_pretrained(where)


def test_other_file_names_are_not_written(model: StableDiffusion_1, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written as .safetensors or as a folder"):
        model.save_pretrained(tmp_path / "model.ckpt")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is memory-mapped there")
def test_loading_takes_no_copy_of_the_files(file: Path) -> None:
    mapped = load(file).unet.OutputBlock.Conv2d.weight
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(str(file))]
    assert any(int(begin, 16) <= mapped.data_ptr() < int(end, 16) for begin, end in spans)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_compute_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"a model computes in torch\.float32, .* not in {dtype}"):
        StableDiffusion_1.from_pretrained("builtin", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which this test wants to be absent")
def test_an_absent_device_is_named(saved: Path) -> None:
    with pytest.raises(RuntimeError, match=r"device 'cuda' .* not available .* device='cpu'"):
        StableDiffusion_1.from_pretrained(saved, device="cuda")
    with pytest.raises(RuntimeError, match=r"device 'cuda' .* not available .* device='cpu'"):
        StableDiffusion_1(device="cuda", spec=SMALL)
