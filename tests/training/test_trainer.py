"""The loop: what trains, what does not, what is the same whatever the way there."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_specimens import Points, config, make_trainer, small_chain

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.training import Callback, NonFiniteError, Trainer
from refiners.training.checkpoint import newest_checkpoint


def weights_of(chain: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in chain.state_dict().items()}


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer, losses = make_trainer(tmp_path, training={"duration": "60:epoch"})
    trainer.train()
    assert len(losses.values) == 300
    assert sum(losses.values[-10:]) < 0.2 * sum(losses.values[:10])


def test_only_what_is_named_moves_and_flags_are_as_before(tmp_path: Path) -> None:
    chain = small_chain()
    chain.Linear_2.requires_grad_(False)
    adapter = LoraAdapter(chain.Linear_1, rank=2, dtype=torch.float32).inject()
    lora, before, gradients = adapter.loras["lora"], weights_of(chain), list[str]()
    flags = {name: parameter.requires_grad for name, parameter in chain.named_parameters()}

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            gradients.extend(name for name, each in chain.named_parameters() if each.requires_grad)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (chain(batch[0]) - batch[1]).square().mean()

    trained = dict(lora.named_parameters())
    Trainer({"chain": chain}, loss, Points(), config(tmp_path), trained=trained, callbacks=[Watch()]).train()
    after = weights_of(chain)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {f"Linear_1.LoraAdapter.LinearLora.{name}.weight" for name in ("down", "up")} == set(gradients)
    assert {name: parameter.requires_grad for name, parameter in chain.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in chain.parameters())


def test_accumulated_iterations_are_one_step_of_a_bigger_batch(tmp_path: Path) -> None:
    class Halves(Points):
        """The two halves of each batch, one after the other."""

        def __len__(self) -> int:
            return 2 * self.length

        def get(self, epoch: int, index: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
            return super().get(epoch, index // 2, index % 2, 2)

    results: list[dict[str, Tensor]] = []
    for batches, accumulation in ((Points(), 1), (Halves(), 2)):
        chain = small_chain()
        chain.eval()  # no dropout: the two ways draw it in different shapes

        def loss(batch: tuple[Tensor, Tensor], chain: fl.Chain = chain) -> Tensor:
            return (chain.eval()(batch[0]) - batch[1]).square().mean()

        training = {"gradient_accumulation": f"{accumulation}:iteration", "clip_grad_norm": 0.1}
        settings = config(tmp_path / str(accumulation), training=training, optimizer={"optimizer": "SGD"})
        Trainer({"chain": chain}, loss, batches, settings).train()
        results.append(weights_of(chain))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_the_bound(tmp_path: Path) -> None:
    settings = {"training": {"duration": "1:step", "clip_grad_norm": 0.01}}
    trainer, _ = make_trainer(tmp_path, **settings, optimizer={"optimizer": "SGD", "learning_rate": 1.0})
    before = weights_of(trainer.models["model"])
    trainer.train()
    moved = torch.cat([(after - before[name]).flatten() for name, after in weights_of(trainer.models["model"]).items()])
    assert trainer.metrics["gradient_norm"] > 0.01
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_an_evaluation_changes_nothing(tmp_path: Path) -> None:
    class Disturb(Callback):
        def on_evaluate(self, trainer: Trainer) -> None:
            assert not any(module.training for module in trainer.models["model"].modules())
            assert not torch.is_grad_enabled()
            torch.manual_seed(5)
            torch.randn(3)

    quiet, expected = make_trainer(tmp_path / "quiet", training={"ema_decay": 0.9})
    quiet.train()
    intervals = {"ema_decay": 0.9, "evaluation_interval": "2:step", "evaluation_seed": 7}
    disturbed, losses = make_trainer(tmp_path / "disturbed", training=intervals)
    disturbed.callbacks.append(Disturb())
    disturbed.train()
    assert losses.values == expected.values
    for one, other in zip(
        weights_of(quiet.models["model"]).values(), weights_of(disturbed.models["model"]).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_the_held_out_loss_is_that_of_the_mean_weights(tmp_path: Path) -> None:
    logged: list[tuple[str, float]] = []

    class Log(Callback):
        def on_log(self, trainer: Trainer, values: Any) -> None:
            logged.extend(item for item in values.items() if item[0] == "held_out/loss")

    chain = small_chain()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (chain(batch[0]) - batch[1]).square().mean()

    settings = config(tmp_path, training={"ema_decay": 0.9, "evaluation_interval": "10:step"})
    trainer = Trainer({"chain": chain}, loss, Points(), settings, held_out=Points(length=3), callbacks=[Log()])
    trainer.train()
    assert trainer.ema is not None
    mean = small_chain().eval()
    mean.load_state_dict({name.removeprefix("chain."): value for name, value in trainer.ema.means.items()})
    with torch.no_grad():
        each = [(mean(x) - y).square().mean() for x, y in (Points().get(0, index, 0, 1) for index in range(3))]
    assert logged == [("held_out/loss", pytest.approx(torch.stack(each).mean().item(), rel=1e-6))]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_computes_in_it_and_trains_in_float32(tmp_path: Path, precision: str) -> None:
    chain, dtypes = small_chain(), set[torch.dtype]()
    chain.Linear_1.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer, losses = make_trainer(tmp_path, chain, training={"duration": "30:epoch", "precision": precision})
    trainer.train()
    assert dtypes == {getattr(torch, precision)}
    assert {parameter.dtype for parameter in chain.parameters()} == {torch.float32}
    assert sum(losses.values[-5:]) < 0.5 * sum(losses.values[:5])


def test_a_bad_weight_stops_the_training_and_is_named(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.clock.step == 5:
                with torch.no_grad():
                    trainer.models["model"].Linear_2.bias[0] = float("inf")

    trainer, losses = make_trainer(tmp_path)
    trainer.callbacks.append(Poison())
    with pytest.raises(NonFiniteError, match=r"step 6 was not made.*the weight model\.Linear_2\.bias is not finite"):
        trainer.train()
    assert len(losses.values) == 5


class Overflow(fl.Module):
    """Gives infinity from some call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / (0 if self.calls > 5 else 1)


def test_a_bad_layer_stops_the_training_and_the_state_before_it_is_kept(tmp_path: Path) -> None:
    chain = small_chain()
    chain.insert(2, Overflow())
    trainer, _ = make_trainer(tmp_path, chain)
    with pytest.raises(NonFiniteError, match=r"first bad layer is model\.Overflow, a Overflow: its output is not fin"):
        trainer.train()
    path = newest_checkpoint(tmp_path / "checkpoints")
    assert path is not None and path.name == "step-00000005"
    assert all(bool(torch.isfinite(weight).all()) for weight in chain.state_dict().values())


def test_a_bad_gradient_is_told_from_a_bad_loss(tmp_path: Path) -> None:
    chain = small_chain()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (chain(batch[0]) * 0).abs().sqrt().mean()  # the slope of a root at 0 is infinite

    with pytest.raises(NonFiniteError, match=r"the loss is finite, but \d gradients are not.*Linear_2"):
        Trainer({"model": chain}, loss, Points(), config(tmp_path)).train()


def test_a_gradient_that_overflows_under_loss_scaling_costs_one_step(tmp_path: Path) -> None:
    chain, weights = small_chain(), list[Tensor]()

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            weights.append(chain.Linear_1.weight.detach().clone())

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (chain(batch[0]) - batch[1]).square().mean() * (1e36 if len(weights) == 3 else 1)

    Trainer(
        {"m": chain}, loss, Points(), config(tmp_path, training={"precision": "float16"}), callbacks=[Watch()]
    ).train()
    same = [torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert same == [False, False, True, *[False] * 6]


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    chain = small_chain()
    chain.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train in model: inject an adapter first"):
        make_trainer(tmp_path, chain)
    with pytest.raises(ValueError, match="2 of 2 parameters to train are in none of the models"):
        trained = dict(fl.Linear(2, 2).named_parameters())
        Trainer({"model": chain}, lambda batch: batch, Points(), config(tmp_path), trained=trained)


def test_no_batches_are_an_error(tmp_path: Path) -> None:
    class Nothing(Points):
        def __len__(self) -> int:
            return 0

    with pytest.raises(ValueError, match="there is nothing to train on: the Nothing given have a length of 0"):
        Trainer({"model": small_chain()}, lambda batch: batch, Nothing(), config(tmp_path))
    with pytest.raises(ValueError, match="there is nothing to hold out"):
        Trainer({"model": small_chain()}, lambda batch: batch, Points(), config(tmp_path), held_out=Nothing())


def test_an_error_in_the_data_is_raised_as_it_is_and_callbacks_are_closed(tmp_path: Path) -> None:
    closed: list[BaseException | None] = []

    class Close(Callback):
        def close(self, error: BaseException | None) -> None:
            closed.append(error)

    class Broken(Points):
        def get(self, epoch: int, index: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
            raise OSError("the disk is gone")

    trainer, _ = make_trainer(tmp_path)
    trainer.batches = Broken()
    trainer.callbacks.append(Close())
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trainer.train()
    assert closed == [caught.value]


@pytest.mark.slow
def test_schedule_free_weights_are_used_where_they_count_and_do_not_disturb(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    seen: list[Tensor] = []

    class Look(Callback):
        def on_evaluate(self, trainer: Trainer) -> None:
            seen.append(trainer.models["model"].Linear_1.weight.detach().clone())

    plain, expected = make_trainer(tmp_path / "a", optimizer={"optimizer": "AdamWScheduleFree"})
    plain.train()
    looked, losses = make_trainer(
        tmp_path / "b", optimizer={"optimizer": "AdamWScheduleFree"}, training={"evaluation_interval": "5:step"}
    )
    looked.callbacks.append(Look())
    looked.train()
    assert losses.values == expected.values and len(seen) == 2
    assert not torch.equal(seen[-1], looked.models["model"].Linear_1.weight)
