"""Makes the embedded model: `python -m refiners.training.pretraining all --folder runs/pretraining`.

Parts, in order: vocabulary, reader, autoencoder, text, diffusion, export; `evaluate` tells how good the model in the
package is. An interrupted part goes on where it was saved last; a part that ended goes on if `--steps` is raised.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.embedded import (
    EMBEDDED_AUTOENCODER,
    EMBEDDED_VOCABULARY,
    EMBEDDED_WEIGHTS,
    make_text_encoder,
)
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.foundationals.scenes.reader import READER_WEIGHTS, Reader, load_reader
from refiners.training.pretraining import autoencoder, diffusion, reader, text
from refiners.training.pretraining.diffusion import TextToLatents
from refiners.training.pretraining.evaluation import evaluate
from refiners.training.pretraining.loop import Plan, load_average, reporter
from refiners.training.pretraining.vocabulary import write_vocabulary
from refiners.weights.files import write_safetensors

PARTS = ("vocabulary", "reader", "autoencoder", "text", "diffusion", "export", "evaluate")
GUIDANCES = (2.0, 3.0)
Parts = tuple[UNet, LatentDiffusionAutoencoder, CLIPTextEncoder]
NAMES = ("unet", "lda", "clip_text_encoder")  # first parts of the names in the weights of the package


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m refiners.training.pretraining", description=__doc__)
    parser.add_argument("part", choices=["all", *PARTS])
    parser.add_argument("--folder", type=Path, default=Path("runs/pretraining"), help="where checkpoints and logs go")
    parser.add_argument("--steps", type=int, help="of training in all, for a part that trains; its own if not given")
    parser.add_argument("--count", type=int, default=500, help="how many captions to evaluate")
    parser.add_argument("--device", default="cpu", help="where the part 'diffusion' trains")
    parser.add_argument("--from-package", action="store_true", help="begin with the package's weights, in a new folder")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        run(part, arguments.folder, arguments.steps, arguments.count, arguments.from_package, arguments.device)


def run(part: str, folder: Path, steps: int | None, count: int, from_package: bool, device: str = "cpu") -> None:
    """Run one of the parts."""
    if part == "vocabulary":
        write_vocabulary(EMBEDDED_VOCABULARY)
    elif part == "reader":
        trained = reader.train_reader(folder, with_steps(reader.PLAN, steps))
        write_safetensors(folder / "reader_final.safetensors", trained.state_dict())
    elif part == "autoencoder":
        lda = autoencoder.train_autoencoder(folder, with_steps(autoencoder.PLAN, steps))
        write_safetensors(folder / "lda_final.safetensors", lda.state_dict())
        report_gate(lda, load_new_reader(folder), folder)
    elif part == "text":
        encoder = text.train_text_encoder(folder, with_steps(text.PLAN, steps))
        write_safetensors(folder / "text_final.safetensors", encoder.state_dict())
    elif part == "diffusion":
        unet, lda, encoder = load_package() if from_package else load_new(folder)
        diffusion.train_diffusion(unet, lda, encoder, folder, with_steps(diffusion.PLAN, steps), device)
    elif part == "export":
        export(folder)
    else:
        report_scores(folder, count)


def with_steps(plan: Plan, steps: int | None) -> Plan:
    """The plan with another number of steps."""
    return plan if steps is None else replace(plan, steps=steps)


def load_new_reader(folder: Path) -> Reader:
    """The reader that was trained in `folder`."""
    return Reader().load_from_safetensors(folder / "reader_final.safetensors")


def load_new(folder: Path) -> Parts:
    """A UNet as it begins, and the autoencoder and the text encoder that were trained in `folder`."""
    lda = LatentDiffusionAutoencoder(EMBEDDED_AUTOENCODER).load_from_safetensors(folder / "lda_final.safetensors")
    return diffusion.new_unet(), lda, make_text_encoder().load_from_safetensors(folder / "text_final.safetensors")


def load_package() -> Parts:
    """The parts that come with the package, in full precision."""
    sd = StableDiffusion_1.from_pretrained("builtin")
    return sd.unet, sd.lda, sd.clip_text_encoder


def export(folder: Path) -> None:
    """Put what was trained in `folder` into the package, in half precision; what was not stays as it is there."""
    has_autoencoder = (folder / "lda_final.safetensors").exists()
    unet, lda, encoder = load_new(folder) if has_autoencoder else load_package()
    load_average(TextToLatents(unet, encoder), folder / "diffusion.safetensors")
    parts = zip(NAMES, (unet, lda, encoder), strict=True)
    tensors = {f"{part}.{name}": value for part, model in parts for name, value in model.state_dict().items()}
    write_half(EMBEDDED_WEIGHTS, tensors)
    if (folder / "reader_final.safetensors").exists():
        write_half(READER_WEIGHTS, load_new_reader(folder).state_dict())


def write_half(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in half precision."""
    write_safetensors(path, {name: value.half() for name, value in tensors.items()})


def report_gate(lda: LatentDiffusionAutoencoder, judge: Reader, folder: Path) -> None:
    """How well pictures come through the autoencoder, without and with noise on the latents."""
    for noise in (0.0, 0.2):
        decibels, exact = autoencoder.gate(lda, judge, noise)
        reporter(folder)(f"autoencoder, latent noise {noise}: {decibels:.1f} dB, {exact:.1%} read exactly")


def report_scores(folder: Path, count: int) -> None:
    """How well the model in the package obeys captions, and its reader reads drawings."""
    sd, report = StableDiffusion_1.from_pretrained("builtin"), reporter(folder)
    report_gate(sd.lda, load_reader(), folder)
    for guidance in GUIDANCES:
        report(f"guidance {guidance}: {evaluate(sd, count, guidance)}")


if __name__ == "__main__":
    main()
