"""Recipes from one TOML to a file that others load, and what training them is: the same gradients as peft's."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from PIL import Image
from torch import Tensor, nn
from training_specimens import SMALL, small_model, write_pictures

import refiners.fluxion.layers as fl
from refiners.fluxion.utils import load_from_safetensors
from refiners.foundationals.clip import ConceptExtender
from refiners.foundationals.clip.concepts import Concept
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import LoraWeights, inspect_lora
from refiners.foundationals.latent_diffusion.unet import TransformerLayer
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names
from refiners.training import ConfigError, DiffusionLoss, Trainer, find_targets
from refiners.training.data.latents import DiffusionBatch
from refiners.training.data.pictures import DataWarning
from refiners.training.recipes.dreambooth import balanced
from refiners.training.recipes.lora import LoraConfig, inject_loras
from refiners.training.recipes.registry import train
from refiners.training.recipes.text_to_image import make_objective
from refiners.weights.lora_keys import Kind

KINDS = {
    "dora": Kind.DORA,
    "loha": Kind.LOHA,
    "lokr": Kind.LOKR,
    "glora": Kind.GLORA,
    "elementwise_glora": Kind.ELEMENTWISE_GLORA,
    "oft": Kind.OFT,
    "boft": Kind.OFT,  # LyCORIS calls its parts the same
    "ia3": Kind.IA3,
}


def write_config(folder: Path, recipe: str, model: Path, pictures: Path, **sections: str) -> Path:
    """A config in one file: 6 steps on a small model, quietly. Each section's lines are appended to its own."""
    lines = {
        "models": f'base = "{model}"',
        "dataset": f'folder = "{pictures}"',
        "training": 'duration = "6:step"\nbatch_size = 2\ndevice = "cpu"',
        "optimizer": "learning_rate = 0.01",
        "checkpointing": f'save_folder = "{folder / "out"}"\nsave_interval = "4:step"',
        "logging": "tensorboard = false\nprogress = false",
    }
    for name, text in sections.items():
        lines[name] = f"{lines.get(name, '')}\n{text}"
    path = folder / f"{recipe}.toml"
    path.write_text(f'recipe = "{recipe}"\n' + "\n".join(f"[{name}]\n{text}" for name, text in lines.items()))
    return path


def predict(sd: StableDiffusion_1, prompt: str = "a red disc") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sd.unet.set_timestep(torch.tensor([400]))
    with torch.no_grad():
        sd.unet.set_clip_text_embedding(sd.clip_text_encoder(prompt))
        return sd.unet(torch.randn(1, 4, 8, 8, generator=generator))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_trained_lora_loads_in_refiners_and_in_diffusers(
    tmp_path: Path, model_folder: Path, picture_folder: Path, form: str
) -> None:
    lora = f'rank = 3\nalpha = 2.0\nformat = "{form}"\ntext_encoder_targets = ["SelfAttention"]'
    path = write_config(
        tmp_path, "lora", model_folder, picture_folder, lora=lora,
        test_diffusion='prompts = ["a disc"]\nnum_inference_steps = 2',
        training='evaluation_interval = "3:step"\nema_decay = 0.5', dataset="held_out = 1\nflip_probability = 0.5",
        latent_diffusion="unconditional_sampling_probability = 0.2\nmin_snr_gamma = 5.0\noffset_noise = 0.05",
    )  # fmt: skip
    trainer = train(path)
    file = tmp_path / "out" / "lora.safetensors"
    assert {sample.name for sample in (tmp_path / "out" / "samples").iterdir()} == {
        "step-00000003-0.png",
        "step-00000006-0.png",
    }
    sd = StableDiffusion_1.from_pretrained(model_folder)
    plain = predict(sd)
    report = LoraWeights(file).patch(sd)
    assert len(report.attached) == len(trainer.weights.names) // 2
    adapted = predict(sd)
    assert (adapted - plain).norm() > 1e-3 * plain.norm()

    pipe: Any = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)

    def theirs() -> Tensor:
        ids = pipe.tokenizer("a red disc", padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.unet(latents, 400, pipe.text_encoder(ids)[0]).sample

    assert (theirs() - plain).norm() < 1e-4 * plain.norm()
    pipe.load_lora_weights(file)
    assert (theirs() - adapted).norm() < 1e-4 * adapted.norm()


def batch_for(sd: StableDiffusion_1) -> DiffusionBatch:
    torch.manual_seed(2)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        embeddings = sd.clip_text_encoder(["a red disc", ""])
    return DiffusionBatch(
        latents, noise, torch.tensor([7, 800]), torch.tensor([1.0, 0.5]), ["", ""], embeddings=embeddings
    )


@pytest.mark.slow
def test_the_loss_and_gradients_of_a_lora_are_those_of_peft() -> None:
    sd, names = small_model(), diffusers_names(SMALL.unet)
    theirs: Any = UNet2DConditionModel(
        block_out_channels=SMALL.unet.channels,
        layers_per_block=SMALL.unet.blocks_per_level,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=SMALL.unet.num_heads,
        cross_attention_dim=SMALL.unet.text_dim,
        norm_num_groups=SMALL.unet.norm_groups,
    )
    theirs.load_state_dict({str(names.to_theirs(key)): value for key, value in sd.unet.state_dict().items()})
    settings = LoraConfig(rank=3, alpha=2.0, unet_targets=("TransformerLayer",))
    choice = inject_loras(sd, settings)
    theirs.requires_grad_(False)
    targets = sorted(
        str(names.to_theirs(f"{name.split('.LoraAdapter')[0]}.weight")).removesuffix(".weight")
        for name, _ in sd.unet.named_parameters()
        if ".down." in name
    )
    theirs.add_adapter(PeftConfig(r=3, lora_alpha=2.0, target_modules=targets, init_lora_weights=False))
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, ours in sd.unet.named_parameters():
            if ".LoraAdapter." not in name:
                continue
            base = str(names.to_theirs(f"{name.split('.LoraAdapter')[0]}.weight")).removesuffix(".weight")
            other = parameters[f"{base}.lora_{'A' if '.down.' in name else 'B'}.default.weight"]
            ours.copy_(other)
            pairs.append((ours, other))
    assert len(pairs) == len(choice.parameters) == 2 * len(targets) > 20
    batch, loss = batch_for(sd), DiffusionLoss()
    ours_loss = make_objective(sd, loss)(batch)
    ours_loss.backward()
    assert batch.embeddings is not None
    noisy = loss.add_noise(batch.latents, batch.noise, batch.timesteps)
    predicted = theirs(noisy, batch.timesteps, batch.embeddings).sample
    theirs_loss = ((predicted - batch.noise).square().mean((1, 2, 3)) * batch.weights).mean()
    theirs_loss.backward()
    torch.testing.assert_close(ours_loss, theirs_loss, rtol=1e-5, atol=0)
    for ours, other in pairs:
        assert ours.grad is not None and other.grad is not None and other.grad.norm() > 0
        assert (ours.grad - other.grad).norm() < 1e-4 * other.grad.norm()


@pytest.mark.slow
def test_a_lora_learns_and_the_base_does_not_move(tmp_path: Path, model_folder: Path, picture_folder: Path) -> None:
    path = write_config(
        tmp_path, "lora", model_folder, picture_folder,
        lora='unet_targets = ["UNet"]\nlayers = ["Linear", "Conv2d"]\nrank = 8\n',
        training="gradient_checkpointing = true",
        latent_diffusion="first_timestep = 400\nend_timestep = 420",
    )  # fmt: skip
    path.write_text(path.read_text().replace('"6:step"', '"40:step"').replace('"4:step"', '"40:step"'))
    sd, values = StableDiffusion_1.from_pretrained(model_folder), list[float]()
    trainer = train(path)
    unet = trainer.models["unet"]
    before = sd.unet.state_dict()
    after = {name: value for name, value in unet.state_dict().items() if ".LoraAdapter." not in name}
    assert list(before) == list(after) and all(map(torch.equal, before.values(), after.values()))
    for lora in (None, LoraWeights(tmp_path / "out" / "lora.safetensors")):
        if lora is not None:
            lora.patch(sd)
        with torch.no_grad():
            batch = trainer.batches.get(0, 0, 0, 1)
            values.append(float(make_objective(sd, DiffusionLoss())(batch)))
    assert values[1] < 0.8 * values[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_train_and_their_file_does_what_was_trained(
    tmp_path: Path, model_folder: Path, picture_folder: Path, kind: str
) -> None:
    layers = '"Linear"' if kind == "elementwise_glora" else '"Linear", "Conv2d"'
    lora = f'kind = "{kind}"\nunet_targets = ["TransformerLayer", "ResidualBlock"]\nlayers = [{layers}]'
    size = "" if kind == "ia3" else "\nrank = 4"
    trainer = train(write_config(tmp_path, "lora", model_folder, picture_folder, lora=lora + size))
    file = tmp_path / "out" / "lora.safetensors"
    sd = StableDiffusion_1.from_pretrained(model_folder)
    plain, unet = predict(sd), trainer.models["unet"]
    after = {name: value for name, value in unet.state_dict().items() if ".DeltaAdapter." not in name}
    assert all(torch.equal(value, after[name]) for name, value in sd.unet.state_dict().items())
    assert set(inspect_lora(file).kinds) == {KINDS[kind]}
    LoraWeights(file).patch(sd)
    adapted = predict(sd)
    assert (adapted - plain).norm() > 1e-3 * plain.norm()
    sd.unet = cast(Any, unet.eval())
    assert (predict(sd) - adapted).norm() < 1e-5 * adapted.norm()


def test_a_kind_that_the_format_does_not_hold_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r'kind = "lokr" is not written in the form of peft; use "kohya"'):
        LoraConfig.read({"kind": "lokr", "format": "peft"})
    with pytest.raises(ConfigError, match='kind = "ia3" has neither a rank nor an alpha'):
        LoraConfig.read({"kind": "ia3", "rank": 4})
    for more in ({"alpha": 2.0}, {"layers": ["Linear", "Conv2d"]}):
        with pytest.raises(ConfigError, match='"elementwise_glora" has no alpha, and is of layers'):
            LoraConfig.read({"kind": "elementwise_glora", **more})
    assert LoraConfig.read({"kind": "dora", "format": "diffusers"}).rank == 16


@pytest.mark.slow
def test_a_finetuned_model_loads_in_refiners(tmp_path: Path, model_folder: Path, picture_folder: Path) -> None:
    path = write_config(tmp_path, "finetune", model_folder, picture_folder, finetune="text_encoder = true")
    trainer = train(path)
    sd = StableDiffusion_1.from_pretrained(tmp_path / "out" / "model")
    base = StableDiffusion_1.from_pretrained(model_folder)
    for name, tree in (("unet", "unet"), ("text_encoder", "clip_text_encoder")):
        for key, value in getattr(sd, tree).state_dict().items():
            assert torch.equal(value, trainer.models[name].state_dict()[key])
            assert not torch.equal(value, getattr(base, tree).state_dict()[key]), key
    assert all(map(torch.equal, sd.lda.state_dict().values(), base.lda.state_dict().values()))


@pytest.mark.slow
def test_dreambooth_makes_its_class_pictures_once(tmp_path: Path, model_folder: Path, picture_folder: Path) -> None:
    prior = (
        'instance_prompt = "a zwx disc"\nclass_prompt = "a disc"\nprior_images = 3\nnum_inference_steps = 2\n'
        "prior_loss_weight = 0.5"
    )
    path = write_config(tmp_path, "dreambooth", model_folder, picture_folder, dreambooth=prior)
    trainer = train(path)
    folder = tmp_path / "out" / "prior"
    pictures = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert [name[:6] for name in sorted(pictures)] == ["00000-", "00001-", "00002-"] and len(
        set(pictures.values())
    ) == 3
    (folder / max(pictures)).unlink()
    train(path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == pictures
    items = getattr(trainer.batches, "items")  # noqa: B009
    assert sorted((item.caption, item.weight) for item in items) == [("a disc", 0.5)] * 3 + [("a zwx disc", 1.0)] * 6
    assert len(load_from_safetensors(tmp_path / "out" / "lora.safetensors")) > 0


@pytest.mark.slow
def test_own_pictures_of_the_class_come_first_and_those_of_another_prompt_are_left_alone(
    tmp_path: Path, model_folder: Path, picture_folder: Path
) -> None:
    prior = 'instance_prompt = "a zwx disc"\nclass_prompt = "{}"\nprior_images = {}\nnum_inference_steps = 1'
    folder, read = tmp_path / "out" / "prior", dict[str, list[str]]()
    for prompt, count in (("a disc", 2), ("a thing", 3)):
        sections = {"dreambooth": prior.format(prompt, count), "checkpointing": "allow_changes = true"}
        trainer = train(write_config(tmp_path, "dreambooth", model_folder, picture_folder, **sections))
        items = getattr(trainer.batches, "items")  # noqa: B009
        read[prompt] = [item.key for item in items if item.caption == prompt]
        Image.new("RGB", (32, 32), "red").save(folder / "mine.png")
    assert len(list(folder.iterdir())) == 2 + 2 + 1 and [len(keys) for keys in read.values()] == [2, 3]
    assert not set(read["a disc"]) & set(read["a thing"])


def test_a_subject_comes_as_often_as_its_class() -> None:
    subject: Any = ["s", "t"]
    assert balanced(subject, ["p"] * 5) == ["s", "t"] * 3 + ["p"] * 5 and balanced(subject, []) == ["s", "t"]  # type: ignore[list-item]


@pytest.mark.slow
def test_textual_inversion_moves_its_vectors_alone(tmp_path: Path, model_folder: Path, picture_folder: Path) -> None:
    words = 'token = "<disc>"\ninitial_text = "red circle"\nvectors = 3'
    path = write_config(
        tmp_path, "textual_inversion", model_folder, picture_folder,
        textual_inversion=words, training="gradient_checkpointing = true",
    )  # fmt: skip
    trainer = train(path)
    ((token, vectors),) = load_from_safetensors(tmp_path / "out" / "concept.safetensors").items()
    assert token == "<disc>" and vectors.shape == (3, 16)
    encoder = trainer.models["text_encoder"]
    (concept,) = [module for module in encoder.modules() if isinstance(module, Concept)]
    assert torch.equal(concept.weight, vectors)
    base = StableDiffusion_1.from_pretrained(model_folder)
    start = base.clip_text_encoder.state_dict()
    assert all(parameter.grad is None for parameter in trainer.models["unet"].parameters())
    assert len(trainer.weights.names) == 1
    after = {
        name: value
        for name, value in encoder.state_dict().items()
        if "ConceptExtender" not in name and "EmbeddingExtender" not in name
    }
    assert list(start) == list(after) and all(map(torch.equal, start.values(), after.values()))
    extender = ConceptExtender(base.clip_text_encoder)
    extender.add_concept(token, vectors)
    extender.inject()
    plain: Any = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    plain.load_textual_inversion(tmp_path / "out" / "concept.safetensors")
    ids = plain.tokenizer(
        plain.maybe_convert_prompt("a <disc>", plain.tokenizer), padding="max_length", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        torch.testing.assert_close(base.clip_text_encoder("a <disc>"), plain.text_encoder(ids)[0], rtol=1e-4, atol=1e-4)


def test_targets_are_found_by_class_and_by_path() -> None:
    unet = small_model().unet
    kinds = (nn.Linear, nn.Conv2d)
    everything = [id(layer) for layer, _ in find_targets(unet, ["UNet"], kinds)]
    assert everything == [id(layer) for layer in unet.modules() if isinstance(layer, kinds)]
    transformers = [id(layer) for layer, _ in find_targets(unet, ["TransformerLayer"])]
    expected = [id(layer) for block in unet.layers(TransformerLayer) for layer in block.layers(fl.Linear)]
    assert transformers == expected
    down = find_targets(unet, ["DownBlocks.*.SelfAttention.*"])
    assert down and all(
        "DownBlocks" in parent.get_path() and "SelfAttention" in parent.get_path() for _, parent in down
    )
    assert all(parent.slot_of(layer) for layer, parent in down)


@pytest.mark.parametrize("pattern", ["CrossAttention", "Attenton", "UpBlock.*.Linear"])
def test_a_target_that_fits_nothing_is_named_with_the_nearest(pattern: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"'{pattern.replace('.', '[.]').replace('*', '[*]')}' fits no Linear of this UNet; (did you|choose)",
    ):
        find_targets(small_model().unet, ["Attention", pattern])


@pytest.mark.slow
def test_too_many_held_out_timesteps_that_are_none_and_sides_that_do_not_fit_are_errors(
    tmp_path: Path, model_folder: Path, picture_folder: Path
) -> None:
    evaluated = {"training": 'evaluation_interval = "1:epoch"', "dataset": "held_out = 6"}
    path = write_config(tmp_path, "lora", model_folder, picture_folder, **evaluated)
    with pytest.raises(ValueError, match="held_out = 6 leaves none of the 6 pictures"):
        train(path)
    path = write_config(
        tmp_path, "lora", model_folder, picture_folder, latent_diffusion="end_timestep = 2000", checkpointing=""
    )
    with pytest.raises(ConfigError, match="end_timestep = 2000 is beyond the 1000 timesteps of this model"):
        train(path)
    for side, message in (
        (7, "it should be greater than"),
        (9, "is no multiple of 8, .* 8$"),
        (30, ".* set it to 32$"),
    ):
        path = write_config(tmp_path, "lora", model_folder, picture_folder, dataset=f"resolution = {side}")
        with pytest.raises(ConfigError, match=rf"dataset\.resolution = {side}:? {message}"):
            train(path)


@pytest.mark.slow
def test_a_bad_picture_is_left_out_if_so_set(tmp_path: Path, model_folder: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "03.png").write_bytes(b"no picture")
    path = write_config(tmp_path, "lora", model_folder, pictures, dataset='on_bad_item = "skip"')
    with pytest.warns(DataWarning, match=r"1 of 6 pictures cannot be read and were left out: .*03\.png"):
        trainer: Trainer = train(path)
    assert trainer.clock.step == 6
