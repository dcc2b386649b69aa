"""A slot holds one LoRA after another without a change of the tree: a compiled model is compiled once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_specimens import kohya_tensors, load_both, outputs, random_factors, write
from torch import Tensor

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import LoraWeights

# Of which layers, and of which rank.
FILES: dict[str, tuple[Any, int]] = {
    "attention": (lambda component, name: "attn" in name, 3),
    "convolutions": (lambda component, name: "conv" in name, 4),
    "text": (lambda component, name: component == "text_encoder", 1),
    "all": (lambda component, name: True, 2),
    "forward": (lambda component, name: "ff" in name, 4),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slot")
    _, theirs = load_both()
    return {
        stem: write(folder / f"{stem}.safetensors", kohya_tensors(random_factors(theirs, choice, rank)))
        for stem, (choice, rank) in FILES.items()
    }


def errors(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(one, other, strict=True))


def test_each_lora_in_the_slot_is_as_if_it_were_added_alone(sd: StableDiffusion_1, files: dict[str, Path]) -> None:
    base, expected = outputs(sd), dict[str, tuple[Tensor, Tensor]]()
    for index, (stem, path) in enumerate(files.items()):
        with sd.loras.applied(path, scale=0.3 + 0.2 * index):
            expected[stem] = outputs(sd)
    slot = sd.loras.reserve(rank=4)
    assert errors(outputs(sd), base) < 1e-6
    for index, (stem, path) in enumerate(files.items()):
        report = slot.load(path, scale=0.3 + 0.2 * index)
        assert report.name == "slot" and report.attached and not report.left_out
        assert errors(outputs(sd), expected[stem]) < 1e-5
    slot.clear()
    assert errors(outputs(sd), base) < 1e-6
    sd.loras.remove("slot")
    assert all(torch.equal(one, other) for one, other in zip(outputs(sd), base, strict=True))


def test_files_that_were_in_it_come_back_the_same(
    sd: StableDiffusion_1, files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = LoraWeights(files["text"]).file.tensors
    more = write(tmp_path / "more.safetensors", {**tensors, "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)})
    slot = sd.loras.reserve(rank=4)
    loras = [LoraWeights(path) for path in (files["all"], files["attention"], more)]
    first = [(slot.load(lora, 0.5, strict=False), outputs(sd)) for lora in loras]
    for lora, (report, expected) in zip(loras, first, strict=True):
        assert slot.load(lora, 0.5, strict=False) == report
        assert all(torch.equal(one, other) for one, other in zip(outputs(sd), expected, strict=True))
    assert first[2][0].left_out
    with pytest.raises(ValueError, match=r"1 of .* keys cannot be used here"):
        slot.load(loras[2])
    slot.load(loras[0], [0.5])  # one scale for each sample, and one for all again
    slot.load(loras[0], 0.5)
    assert all(torch.equal(one, other) for one, other in zip(outputs(sd), first[0][1], strict=True))


def test_nothing_of_an_earlier_lora_comes_back_with_a_scale(sd: StableDiffusion_1, files: dict[str, Path]) -> None:
    base = outputs(sd)
    with sd.loras.applied(files["text"], scale=0.4):
        expected = outputs(sd)
    slot = sd.loras.reserve(rank=4)
    slot.load(files["all"])
    slot.load(files["text"])
    sd.loras.set_scale("slot", 0.4)
    assert errors(outputs(sd), expected) < 1e-5
    slot.clear()
    sd.loras.set_scale("slot", 2.0)
    assert errors(outputs(sd), base) < 1e-6


def test_a_slot_that_is_off_the_model_takes_no_lora(sd: StableDiffusion_1, files: dict[str, Path]) -> None:
    slot = sd.loras.reserve(rank=4)
    slot.load(files["all"])
    merged = sd.loras.merge("slot")
    with pytest.raises(RuntimeError, match="slot 'slot' is not on the model any more: reserve another, or unmerge"):
        slot.load(files["text"])
    merged.unmerge()
    assert slot.load(files["text"]).attached
    sd.loras.clear()
    with pytest.raises(RuntimeError, match="slot 'slot' is not on the model any more"):
        slot.load(files["text"])


def test_a_slot_can_be_scaled_merged_and_stacked_like_any_other(sd: StableDiffusion_1, files: dict[str, Path]) -> None:
    sd.loras.add(files["all"], scale=0.5)
    sd.loras.add(files["attention"], scale=-0.7)
    expected = outputs(sd)
    sd.loras.remove("attention")
    slot = sd.loras.reserve(rank=8, name="swap")
    slot.load(files["attention"])
    sd.loras.set_scale("swap", -0.7)
    assert errors(outputs(sd), expected) < 1e-5
    merged = sd.loras.merge("swap")
    assert errors(outputs(sd), expected) < 1e-5
    merged.unmerge()
    assert errors(outputs(sd), expected) < 1e-5


def test_what_does_not_fit_leaves_the_slot_as_it_was(
    sd: StableDiffusion_1, files: dict[str, Path], tmp_path: Path
) -> None:
    slot = sd.loras.reserve(rank=2)
    slot.load(files["all"])
    before = outputs(sd)
    with pytest.raises(ValueError, match=r"has rank 3, and the slot 'slot' holds up to 2: reserve more, or resize"):
        slot.load(files["attention"])
    tensors = LoraWeights(files["text"]).file.tensors
    strange = write(tmp_path / "strange.safetensors", {**tensors, "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"1 of .* keys cannot be used here"):
        slot.load(strange)
    difference = {"lora_unet_conv_in.diff": torch.zeros(sd.unet.state_dict()["DownBlocks.Chain_1.Conv2d.weight"].shape)}
    with pytest.raises(ValueError, match="is a full difference, and a slot holds LoRA only"):
        slot.load(write(tmp_path / "difference.safetensors", difference))
    assert all(torch.equal(one, other) for one, other in zip(outputs(sd), before, strict=True))
    with pytest.raises(ValueError, match="a LoRA 'slot' on this model already"):
        sd.loras.reserve(rank=1)


@pytest.mark.parametrize("scale", [float("nan"), [0.5, float("inf")], "0.5"])
def test_a_bad_scale_leaves_the_slot_as_it_was(sd: StableDiffusion_1, files: dict[str, Path], scale: Any) -> None:
    slot = sd.loras.reserve(rank=4)
    slot.load(files["all"], scale=0.5)
    before = outputs(sd)
    with pytest.raises((TypeError, ValueError), match="scale"):
        slot.load(files["attention"], scale=scale)
    assert all(torch.equal(one, other) for one, other in zip(outputs(sd), before, strict=True))


def test_values_beyond_the_number_format_of_the_model_leave_the_slot_as_it_was(
    sd: StableDiffusion_1, files: dict[str, Path], tmp_path: Path
) -> None:
    sd.unet.to(torch.float16)
    slot = sd.loras.reserve(rank=4)
    slot.load(files["all"])
    before = {name: tensor.clone() for name, tensor in sd.unet.state_dict().items()}
    tensors = {key: tensor * 1e6 for key, tensor in LoraWeights(files["forward"]).file.tensors.items()}
    with pytest.raises(ValueError, match=r"in torch\.float16 the up of .lora_unet_.*_ff_.* has values that are NaN"):
        slot.load(write(tmp_path / "large.safetensors", tensors))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.unet.state_dict().items())


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_for_all_files(sd: StableDiffusion_1, files: dict[str, Path]) -> None:
    slot = sd.loras.reserve(rank=4)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = StableDiffusion_1(sd.unet, sd.lda, sd.clip_text_encoder, spec=sd.spec)
    torch.compiler.reset()
    unet = torch.compile(sd.unet, fullgraph=True, backend=backend)
    encoder = torch.compile(sd.clip_text_encoder, fullgraph=True, backend=backend)
    x, text, ids = torch.randn(2, 4, 8, 8), torch.randn(2, 7, sd.spec.unet.text_dim), torch.randint(0, 49000, (2, 77))

    def run(unet: Any, encoder: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            sd.unet.set_timestep(torch.tensor([5, 700]))
            sd.unet.set_clip_text_embedding(text)
            return unet(x), encoder(ids)

    for index, path in enumerate(files.values()):
        slot.load(path, scale=0.1 + index)
        compiled = run(unet, encoder)
        assert errors(compiled, run(plain.unet, plain.clip_text_encoder)) < 1e-5
        sd.loras.set_scale("slot", -0.5)
        run(unet, encoder)
    assert len(graphs) == 2
