"""ControlNets, T2I-Adapters and IP-Adapters from one TOML: they learn, nothing else moves, and others load them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image, ImageFilter
from torch import Tensor
from training_specimens import randomize, small_model, write_pictures

from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.control import ControlNetAdapter
from refiners.foundationals.latent_diffusion.control.control_net_weights import load_control_net
from refiners.foundationals.latent_diffusion.control.t2i_adapter import T2IAdapter
from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import T2ISpec
from refiners.foundationals.latent_diffusion.control.t2i_adapter_names import load_condition_encoder
from refiners.foundationals.latent_diffusion.image_prompt import IPAdapter
from refiners.foundationals.scenes import Split, draw_scenes, make_scenes, parse_caption
from refiners.foundationals.scenes.controls import draw_controls
from refiners.foundationals.scenes.reader import load_image_encoder
from refiners.training import DiffusionLoss, Trainer
from refiners.training.data.latents import DiffusionBatch
from refiners.training.data.pictures import DataError
from refiners.training.recipes import judging
from refiners.training.recipes.control_net import ControlNetConfig, inject_control_net
from refiners.training.recipes.ip_adapter import IPAdapterConfig, inject_ip_adapter
from refiners.training.recipes.leading import Lead
from refiners.training.recipes.registry import train
from refiners.training.recipes.t2i_adapter import T2IAdapterConfig, inject_t2i_adapter
from refiners.training.recipes.text_to_image import BLOCKS, Choice, make_objective
from refiners.training.recomputation import recompute
from refiners.training.settings import ConfigError

NAMES = ("control_net", "t2i_adapter", "ip_adapter")
INJECT: dict[str, Callable[[StableDiffusion_1], Choice]] = {
    "control_net": lambda sd: inject_control_net(sd, ControlNetConfig()),
    "t2i_adapter": lambda sd: inject_t2i_adapter(sd, T2IAdapterConfig()),
    "ip_adapter": lambda sd: inject_ip_adapter(sd, IPAdapterConfig()),
}


def write_led_pictures(folder: Path) -> Path:
    """Captioned discs, and in the folder "edges" their outlines."""
    write_pictures(folder)
    (folder / "edges").mkdir()
    for path in folder.glob("*.png"):
        Image.open(path).convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB").save(folder / "edges" / path.name)
    return folder


def write_config(folder: Path, recipe: str, model: Path, pictures: Path, steps: int = 6, more: str = "") -> Path:
    path = folder / f"{recipe}.toml"
    path.write_text(f"""
        recipe = "{recipe}"
        models.base = "{model}"
        dataset.folder = "{pictures}"
        dataset.conditioning_folder = "{pictures / "edges"}"
        dataset.held_out = 2
        training.duration = "{steps}:step"
        training.batch_size = 2
        training.evaluation_interval = "3:step"
        training.device = "cpu"
        optimizer.learning_rate = 0.01
        checkpointing.save_folder = "{folder / "out"}"
        checkpointing.save_interval = "4:step"
        logging.tensorboard = false
        logging.progress = false
        {more}
    """)
    return path


def predict(sd: StableDiffusion_1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sd.unet.set_timestep(torch.tensor([400]))
    with torch.no_grad():
        sd.unet.set_clip_text_embedding(sd.clip_text_encoder("a red disc"))
        return sd.unet(torch.randn(1, 4, 8, 8, generator=generator))


def load_result(sd: StableDiffusion_1, recipe: str, folder: Path, image: Image.Image) -> Any:
    """The adapter that a recipe left, injected and shown a picture."""
    if recipe == "control_net":
        control_net = ControlNetAdapter(sd, load_control_net(folder / "control-net", sd.unet)).inject()
        control_net.set_controlnet_condition(image)
        return control_net
    if recipe == "t2i_adapter":
        spec = T2ISpec.for_unet(sd.unet.spec, sd.lda.spec.downsampling_factor)
        encoder = load_condition_encoder(folder / "t2i-adapter.safetensors", spec)
        t2i_adapter = T2IAdapter(sd.unet, condition_encoder=encoder).inject()
        t2i_adapter.set_condition_features(t2i_adapter.compute_condition_features(image))
        return t2i_adapter
    ip_adapter = IPAdapter(sd, load_image_encoder(), weights=folder / "ip-adapter.safetensors").inject()
    ip_adapter.set_clip_image_embedding(ip_adapter.compute_clip_image_embedding(image)[1:])
    return ip_adapter


@pytest.mark.parametrize("recipe", NAMES)
def test_what_a_recipe_leaves_loads_and_leads_and_the_base_has_not_moved(
    tmp_path: Path, model_folder: Path, recipe: str
) -> None:
    pictures = write_led_pictures(tmp_path / "pictures")
    more = f"""
        training.gradient_checkpointing = true
        test_diffusion.prompts = ["a disc"]
        test_diffusion.conditioning = ["{pictures}/edges/01.png"]
        test_diffusion.num_inference_steps = 2
    """
    trainer = train(write_config(tmp_path, recipe, model_folder, pictures, more=more))
    assert {path.name for path in (tmp_path / "out" / "samples").iterdir()} == {
        "step-00000003-0.png",
        "step-00000006-0.png",
    }
    sd = StableDiffusion_1.from_pretrained(model_folder)
    after = trainer.models["unet"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in sd.unet.state_dict().items())
    plain = predict(sd)
    adapter = load_result(sd, recipe, tmp_path / "out", Image.open(pictures / "edges" / "00.png"))
    first = predict(sd)
    assert (first - plain).norm() > 1e-3 * plain.norm()
    adapter.eject()
    assert torch.equal(predict(sd), plain)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, model_folder: Path, recipe: str) -> None:
    results: list[dict[str, Tensor]] = []
    dropped = "ip_adapter.image_drop_probability = 0.5" if recipe == "ip_adapter" else ""
    pictures = write_led_pictures(tmp_path / "pictures")
    for name, stops in (("whole", [6]), ("halves", [4, 6])):
        (tmp_path / name).mkdir()
        trainer: Trainer | None = None
        for steps in stops:
            trainer = train(write_config(tmp_path / name, recipe, model_folder, pictures, steps, dropped))
        assert trainer is not None
        results.append({key: value.detach() for key, value in trainer.weights.parameters.items()})
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def batch_of_scenes(sd: StableDiffusion_1, lead: Lead, kind: str, count: int = 8) -> DiffusionBatch:
    """A batch in which nothing but the picture tells what is where."""
    scenes = make_scenes(count, torch.Generator().manual_seed(1), Split.TRAIN)
    with torch.no_grad():
        latents = sd.lda.encode(draw_scenes(scenes, torch.Generator().manual_seed(5)))
        embeddings = sd.clip_text_encoder([""] * count)
    images = draw_controls(scenes.to_list(), kind, seed=5)
    return DiffusionBatch(
        latents,
        torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)),
        torch.full((count,), 990),
        torch.ones(count),
        [""] * count,
        embeddings=embeddings,
        conditioning=torch.stack([lead.conditioning.prepare(image) for image in images]),
    )


@pytest.mark.parametrize("recipe", NAMES)
def test_an_adapter_learns_from_its_pictures_and_gradients_reach_nothing_else(recipe: str) -> None:
    torch.manual_seed(0)
    sd = StableDiffusion_1.from_pretrained("builtin").requires_grad_(False)
    choice = INJECT[recipe](sd)
    assert choice.lead is not None
    batch = batch_of_scenes(sd, choice.lead, "thing" if recipe == "ip_adapter" else "classes")
    objective = make_objective(sd, DiffusionLoss(sd.spec.solver_params), choice.lead)
    own = [parameter.requires_grad_() for parameter in choice.parameters.values()]
    optimizer, losses = torch.optim.Adam(own, lr=3e-3), list[float]()
    for _ in range(10):
        optimizer.zero_grad()
        loss = objective(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(parameter.grad is not None for parameter in own)
    ours = {id(parameter) for parameter in own}
    assert all(parameter.grad is None for parameter in sd.parameters() if id(parameter) not in ours)


@pytest.mark.parametrize("recipe", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(recipe: str) -> None:
    gradients: list[list[Tensor]] = []
    for is_recomputed in (False, True):
        sd = small_model()
        choice = INJECT[recipe](sd)
        assert choice.lead is not None
        for tree in (sd.unet, *choice.models.values()):
            randomize(tree)  # what is zero at first lets no gradient through
            if is_recomputed and any(isinstance(module, BLOCKS) for module in tree.modules()):
                recompute(tree, BLOCKS)
        objective = make_objective(sd, DiffusionLoss(), choice.lead)
        objective(batch_of_scenes(sd, choice.lead, "classes", count=2)).backward()
        gradients.append([cast(Tensor, parameter.grad) for parameter in choice.parameters.values()])
    assert all(gradient.norm() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


def test_a_trained_control_net_predicts_the_same_in_diffusers(tmp_path: Path, model_folder: Path) -> None:
    pictures = write_led_pictures(tmp_path / "pictures")
    train(write_config(tmp_path, "control_net", model_folder, pictures))
    theirs: Any = ControlNetModel.from_pretrained(tmp_path / "out" / "control-net")
    their_unet: Any = UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")
    sd = StableDiffusion_1.from_pretrained(model_folder)
    image = Image.open(pictures / "edges" / "00.png")
    load_result(sd, "control_net", tmp_path / "out", image)
    x, text = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), sd.clip_text_encoder("a red disc")
    with torch.no_grad():
        down, middle = theirs(x, 400, text, image_to_tensor(image), return_dict=False)
        wanted = their_unet(
            x, 400, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
    assert (predict(sd) - wanted).norm() < 1e-4 * wanted.norm()


def test_a_picture_without_another_to_lead_by_is_an_error_but_for_image_prompts(
    tmp_path: Path, model_folder: Path
) -> None:
    pictures = write_led_pictures(tmp_path / "pictures")
    for path in (pictures / "edges").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"there is no conditioning picture with it; put one of the same name"):
        train(write_config(tmp_path, "control_net", model_folder, pictures))
    assert train(write_config(tmp_path, "ip_adapter", model_folder, pictures)).clock.step == 6


@pytest.mark.parametrize("recipe", ["control_net", "ip_adapter"])
def test_coarse_weights_need_a_computation_in_their_format(tmp_path: Path, recipe: str) -> None:
    path = write_config(tmp_path, recipe, tmp_path, tmp_path, more='models.dtype = "bfloat16"')
    with pytest.raises(ConfigError, match=r'models\.dtype = "bfloat16" does not meet the float32'):
        train(path)


def test_a_model_that_copies_what_it_is_shown_carries_all_and_one_that_ignores_it_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copying(sd: Any, show: Any, prompts: Sequence[str], shown: Any, seed: int) -> Any:
        assert not any(prompts)
        return shown

    def ignoring(sd: Any, show: Any, prompts: Sequence[str], shown: Any, seed: int) -> Any:
        return [shown[0]] * len(prompts)

    sd: Any = None
    monkeypatch.setattr(judging, "generate", copying)
    assert judging.judge(sd, len, "thing", 60)["carried"] > 0.97
    monkeypatch.setattr(judging, "generate", ignoring)
    assert judging.judge(sd, len, "thing", 60)["carried"] < 0.2


def test_the_judge_shows_each_picture_with_a_prompt_that_says_nothing_of_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sd, shown, prompts = StableDiffusion_1.from_pretrained("builtin"), list[Image.Image](), list[str]()
    compute = StableDiffusion_1.compute_conditions

    def listening(self: StableDiffusion_1, text: Any, negative: Any, size: Any) -> Any:
        prompts.extend(text)
        return compute(self, text, negative, size)

    monkeypatch.setattr(StableDiffusion_1, "compute_conditions", listening)
    shares = judging.judge(sd, shown.extend, "edges", 3, num_inference_steps=1)
    assert shares.keys() == {"places", "shapes", "colors", "things"} and len(shown) == len(prompts) == 3
    assert all(request.things and not request.asks_for_places for request in map(parse_caption, prompts))
