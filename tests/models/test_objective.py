"""The chunked loss is the model's own; distillation is the divergence written out, from a base or a teacher."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
import transformers as tf

from qat_plugin.errors import ConfigError
from qat_plugin.models.head import SplitModel, split
from qat_plugin.models.objective import Distillation, Objective
from qat_plugin.qlora import prepare
from tests.qlora.adapters import learned
from tests.qlora.tiny_models import FAMILIES

IDS = torch.arange(24).reshape(2, 12) * 7 % 64
LABELS = IDS.clone().index_fill(1, torch.tensor([0, 1, 7]), -100)
BATCH = {"input_ids": IDS, "labels": LABELS}


def lively(family: str, **config: Any) -> Any:
    """A random model whose logits are far from uniform, in eval mode."""
    model = FAMILIES[family]()
    if config:
        changed = copy.deepcopy(model.config)
        changed.update(config)
        model = type(model)(changed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model.eval()


FAMILY_OPTIONS = {"llama": {}, "llama-tied": {}, "gpt2": {}, "gemma2": {"final_logit_softcapping": 3.0}}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the scored positions, from logits, by the definition."""
    scored = LABELS[:, 1:] != -100
    ours, theirs = (logits[:, :-1][scored] / temperature for logits in (student, teacher.detach()))
    p = theirs.softmax(-1)
    return temperature**2 * (p * (p.log() - ours.log_softmax(-1))).sum(-1).mean()


def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_the_chunked_loss_and_its_gradients_are_the_models_own(family: str) -> None:
    model = lively(family, **FAMILY_OPTIONS[family])
    own = model(input_ids=IDS, labels=LABELS, use_cache=False).loss
    expected = gradients(model, own)
    assert isinstance(split(model), SplitModel)  # else it falls back on the model's own loss
    chunked = Objective(model, chunked=True)(BATCH)
    found = gradients(model, chunked)
    assert chunked.item() == pytest.approx(own.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(Objective(model, chunked=False)(BATCH), own)


def test_the_soft_cap_counts() -> None:
    model = lively("gemma2", final_logit_softcapping=3.0)
    capped = Objective(model)(BATCH).item()
    model.config.final_logit_softcapping = None
    assert Objective(model)(BATCH).item() != pytest.approx(capped, rel=0.01)


def test_adapters_learn_the_same_from_the_chunked_loss() -> None:
    model = learned(prepare(lively("llama"), rank=4, alpha=8)).train()
    expected = gradients(model, Objective(model, chunked=False)(BATCH))
    found = gradients(model, Objective(model)(BATCH))
    assert len(found) == 2 * 14 and found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert model.training  # taking it apart looks at it in eval mode


@pytest.mark.parametrize("chunked", [True, False])
def test_packed_documents_have_the_loss_of_each_alone(chunked: bool) -> None:
    """Position ids that start again separate documents: no token sees another document."""
    model = lively("llama")
    objective = Objective(model, chunked=chunked)
    first, second = IDS[:1, :7], IDS[1:, :5]
    packed = torch.cat([first, second], dim=1)
    labels = packed.clone()
    labels[0, 7] = -100
    positions = torch.cat([torch.arange(7), torch.arange(5)]).unsqueeze(0)
    together = objective({"input_ids": packed, "labels": labels, "position_ids": positions})
    alone = [objective({"input_ids": ids, "labels": ids}).item() for ids in (first, second)]
    assert together.item() == pytest.approx((6 * alone[0] + 4 * alone[1]) / 10, rel=1e-5)
    blurred = objective({"input_ids": packed, "labels": labels})
    assert blurred.item() != pytest.approx(together.item(), rel=1e-3)


def test_padding_is_not_seen() -> None:
    objective = Objective(lively("llama"))
    short = {"input_ids": IDS[:, :8], "labels": IDS[:, :8]}
    padded = {"input_ids": IDS, "attention_mask": (torch.arange(12) < 8).long().expand(2, 12)}
    padded["labels"] = IDS.masked_fill(padded["attention_mask"] == 0, -100)
    assert objective(padded).item() == pytest.approx(objective(short).item(), rel=1e-5)


# ---- distillation


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 2.0), (0.25, 0.7)])
@pytest.mark.parametrize("base", ["nf4-dq", None, "w4a16-g32"])
def test_the_base_without_adapters_teaches(base: str | None, weight: float, temperature: float) -> None:
    source = lively("llama")
    twin = copy.deepcopy(source)
    model = prepare(source, base, rank=4, alpha=8).eval()
    taught = logits_of(twin if base == "w4a16-g32" else model)  # in float; with adapters that are zero
    learned(model, seed=2).train()
    own = model(input_ids=IDS, labels=LABELS, use_cache=False)
    kl = divergence(own.logits, taught, temperature)
    assert kl > 0.01
    expected = (1 - weight) * own.loss + weight * kl
    wanted = gradients(model, expected)
    objective = Objective(model, distillation=Distillation(weight, temperature))
    found = objective(BATCH)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    assert model.training
    assert torch.equal(logits_of(model), own.logits)  # adapters and fake quantization are on again
    assert objective.cross_entropy(BATCH).item() == pytest.approx(own.loss.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_given_teacher_teaches_in_eval_mode_and_gets_no_gradient(family: str, temperature: float) -> None:
    student = lively(family, **FAMILY_OPTIONS[family])
    torch.manual_seed(9)
    teacher = lively(family, **FAMILY_OPTIONS[family], attention_dropout=0.5)
    kl = divergence(logits_of(student), logits_of(teacher), temperature)
    teacher.train()
    loss = Objective(student, distillation=Distillation(1.0, temperature), teacher=teacher)(BATCH)
    assert loss.item() == pytest.approx(kl.item(), rel=1e-4)
    found = gradients(student, loss)
    assert found and all(torch.isfinite(gradient).all() for gradient in found.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher.training


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hidden_states_are_compared_block_by_block(family: str) -> None:
    student, teacher = lively(family, **FAMILY_OPTIONS[family]), lively(family, **FAMILY_OPTIONS[family])
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    own, theirs = (
        model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[1:]
        for model in (student.eval(), teacher.eval())
    )
    scored = LABELS != -100
    scored = torch.cat([scored[:, 1:], torch.zeros_like(scored[:, :1])], 1)  # positions that predict something
    errors = [
        (mine[scored].double() - other[scored].double()).square().sum() / other[scored].double().square().sum()
        for mine, other in zip(own, theirs, strict=True)
    ]
    kl = divergence(logits_of(student), logits_of(teacher), 1.0)
    expected = kl.item() + 3.0 * (sum(errors) / len(errors)).item()
    loss = Objective(student, distillation=Distillation(1.0, hidden=3.0), teacher=teacher)(BATCH)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert sum(errors).item() > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(student, loss).values())


def test_hidden_states_of_another_width_are_refused() -> None:
    student, teacher = lively("llama"), lively("llama", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"the student has 2 of width \d+, the teacher 3"):
        Objective(student, distillation=Distillation(1.0, hidden=1.0), teacher=teacher)(BATCH)
    with pytest.raises(ConfigError, match=r"distill\.hidden=-1\.0 is not allowed"):
        Distillation(1.0, hidden=-1.0)


@pytest.mark.parametrize("families", [("llama", "gemma2"), ("gemma2", "llama")])
def test_student_and_teacher_each_transform_their_own_logits(families: tuple[str, str]) -> None:
    student, teacher = (lively(family, **FAMILY_OPTIONS[family]) for family in families)
    kl = divergence(logits_of(student), logits_of(teacher), 1.0)
    assert Objective(student, distillation=Distillation(1.0), teacher=teacher)(BATCH).item() == pytest.approx(kl.item())


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    model = prepare(lively("llama"), rank=4)
    loss = Objective(model, distillation=Distillation(1.0))(BATCH)
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients(model, loss).values())


def test_a_teacher_is_needed() -> None:
    with pytest.raises(ConfigError, match="distillation needs a teacher: give one, or prepare the model"):
        Objective(lively("llama"), distillation=Distillation())(BATCH)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.0), r"distill\.weight=0\.0 is not allowed"),
        ((1.5, 1.0), r"distill\.weight=1\.5 is not allowed"),
        ((0.5, 0.0), r"distill\.temperature=0\.0 is not allowed"),
        ((0.5, -2.0), r"distill\.temperature=-2\.0 is not allowed"),
    ],
)
def test_weights_and_temperatures_out_of_range_are_refused(values: tuple[float, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(*values)


class Biased(tf.LlamaForCausalLM):
    """Does something with its logits that nobody knows of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **{**kwargs, "labels": None})
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        if kwargs.get("labels") is not None:
            scores = out.logits[:, :-1].flatten(0, 1)
            out.loss = F.cross_entropy(scores, kwargs["labels"][:, 1:].flatten())
        return out


@pytest.mark.parametrize("distil", [False, True])
def test_a_model_that_cannot_be_taken_apart_keeps_its_own_loss(distil: bool) -> None:
    model = Biased(FAMILIES["llama"]().config).eval()
    options = {"distillation": Distillation(), "teacher": lively("llama")} if distil else {}
    objective = Objective(model, **options)
    with pytest.raises(ConfigError, match="Biased does something") if distil else nullcontext():
        with pytest.warns(UserWarning, match="the loss is not chunked.*Biased") if not distil else nullcontext():
            loss = objective(BATCH)
        assert torch.equal(loss, model(input_ids=IDS, labels=LABELS, use_cache=False).loss)
