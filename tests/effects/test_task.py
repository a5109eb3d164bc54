"""Every task's loss is the paper's, and a trainer that computes another is refused."""

from __future__ import annotations

import math

import pytest

TASKS = {
    "sft": (),
    "pretrain": (),
    "dpo": ("task.beta=0.3",),
    "dpo, smoothed": ("task=dpo", "task.label_smoothing=0.2"),
    "dpo, precomputed": ("task=dpo", "task.precompute_ref=true"),
    "ipo": ("task.beta=0.2",),
    "kto": ("task.desirable_weight=1.3", "task.undesirable_weight=0.7"),
    "kto, precomputed": ("task=kto", "task.precompute_ref=true"),
    "orpo": ("task.beta=0.4",),
    "simpo": ("task.beta=2.5", "task.gamma=1.2"),
    "reward": ("task.center_rewards_coefficient=0.05",),
    "grpo": ("task.beta=0.04", "task.temperature=0.8", "task.loss_type=grpo", "task.max_completion_length=9"),
    "grpo, dapo": ("task=grpo", "task.rewards=[length,json]", "task.reward_weights=[1.0,0.5]"),
    "grpo, dr_grpo": ("task=grpo", "task.loss_type=dr_grpo", "task.beta=0.1", "task.num_generations=2"),
    "grpo, bnpo": ("task=grpo", "task.loss_type=bnpo"),
}


def words(name):
    return (f"task={name}", *TASKS[name]) if "," not in name else TASKS[name]


@pytest.mark.parametrize("lora", ["lora", "none"])
@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_the_papers(build, wrong, name, lora):
    from soup import effects

    built = build(*words(name), f"lora={lora}")
    assert wrong(built) == {}
    proved = {effect.key: effect for effect in effects.prove(built)}
    live, paper = numbers(proved["task.name"].how)
    assert live == pytest.approx(paper, rel=1e-5, abs=1e-5)
    assert math.isfinite(live)
    for key in built.config.tree["task"]:
        assert key == "name" or f"task.{key}" in proved


def numbers(how):
    """`the trainer's loss is 0.6, the paper's 0.7`"""
    return [float(word.strip(",;")) for word in how.replace("; with", " ").split()[4:8:3]]


def changed(name, value):
    def after(built):
        setattr(built.trainer, name, value)

    return after


def argument(name, value):
    def after(built):
        setattr(built.trainer.args, name, value)

    return after


def no_reference(built):
    """The policy itself stands in for the reference."""
    built.trainer.ref_model = built.model


def wrong_table(built):
    rows = built.trainer.train_dataset
    shifted = [value + 1.0 for value in rows["ref_chosen_logps"]]
    built.trainer.train_dataset = rows.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", shifted
    )


def prompt_learnt(built):
    """The collator of pairs takes the prompt for a part of the answer."""
    import torch

    real = built.trainer.data_collator

    def collate(examples):
        batch = real(examples)
        batch["completion_mask"] = torch.maximum(batch["completion_mask"], batch["attention_mask"])
        return batch

    built.trainer.data_collator = collate


def rewards_swapped(built):
    built.trainer.reward_funcs = built.trainer.reward_funcs[::-1]


def colder(built):
    built.trainer.generation_config.temperature = 0.5


SABOTAGED = {
    "dpo: beta": ("task=dpo", changed("beta", 0.13), "task.beta"),
    "dpo: another loss": ("task=dpo", changed("loss_types", ["hinge"]), "task.name"),
    "dpo: smoothing dropped": (
        "task=dpo task.label_smoothing=0.1",
        changed("loss_weights", [1.0, 0.0]),
        "task.label_smoothing",
    ),
    "dpo: no reference": ("task=dpo lora=none", no_reference, "task.precompute_ref"),
    "dpo: a table of another model": (
        "task=dpo task.precompute_ref=true",
        wrong_table,
        "task.precompute_ref",
    ),
    "ipo: the prompt is learnt": ("task=ipo", prompt_learnt, "task.name"),
    "ipo: beta": ("task=ipo", changed("beta", 0.11), "task.beta"),
    "kto: beta": ("task=kto", changed("beta", 0.2), "task.beta"),
    "kto: weight": ("task=kto", changed("undesirable_weight", 1.2), "task.undesirable_weight"),
    "orpo: beta": ("task=orpo", changed("beta", 0.2), "task.beta"),
    "simpo: gamma": ("task=simpo", changed("simpo_gamma", 0.5), "task.gamma"),
    "simpo: cpo_alpha": ("task=simpo", changed("cpo_alpha", 1.0), "task.name"),
    "reward: centring": (
        "task=reward task.center_rewards_coefficient=0.1",
        argument("center_rewards_coefficient", 0.0),
        "task.center_rewards_coefficient",
    ),
    "grpo: beta": ("task=grpo task.beta=0.1", changed("beta", 0.3), "task.beta"),
    "grpo: loss": ("task=grpo task.loss_type=dr_grpo", changed("loss_type", "grpo"), "task.loss_type"),
    "grpo: temperature": ("task=grpo", colder, "task.temperature"),
    "grpo: temperature of the loss": ("task=grpo task.beta=0.1", changed("temperature", 0.5), "task.name"),
    "grpo: generations": ("task=grpo", changed("num_generations", 2), "task.num_generations"),
    "grpo: rewards": ("task=grpo task.rewards=[length,json]", rewards_swapped, "task.rewards"),
}


@pytest.mark.parametrize(("overrides", "after", "key"), SABOTAGED.values(), ids=SABOTAGED)
def test_a_trainer_with_another_loss_is_refused(build, wrong, overrides, after, key):
    built = build(*overrides.split())
    assert wrong(built) == {}
    after(built)
    assert key in wrong(built)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo, dr_grpo", "orpo"])
def test_the_probe_leaves_nothing_behind(build, name):
    import torch

    from soup import effects

    built = build(*words(name))
    before = {key: value.clone() for key, value in built.model.state_dict().items()}
    state = torch.get_rng_state()
    effects.prove(built)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in built.model.state_dict().items())
    sums = [getattr(built.trainer, key, {}) for key in ("_metrics", "_stored_metrics")]
    assert not any(values for modes in sums for values in modes.values())
    assert built.trainer.state.num_input_tokens_seen == 0


def test_the_formulas_by_hand():
    """Against numbers worked out with nothing but `math`."""
    import torch

    from soup.effects import losses

    def row(label=True, **sides):
        return losses.Row(
            answers={side: torch.tensor(values, dtype=torch.float64) for side, values in sides.items()},
            whole={
                side: torch.tensor([-3.0, *values], dtype=torch.float64) for side, values in sides.items()
            },
            label=label,
        )

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    policy = [row(chosen=[-1.0, -1.0], rejected=[-2.0, -3.0, -4.0])]
    frozen = [row(chosen=[-1.5, -1.5], rejected=[-2.0, -2.0, -2.0])]
    z = 0.1 * ((-2 + 3) - (-9 + 6))
    one = -0.9 * math.log(sigmoid(z)) - 0.1 * math.log(sigmoid(-z))
    assert float(losses.dpo(policy, frozen, beta=0.1, label_smoothing=0.1)) == pytest.approx(one, rel=1e-12)
    gap = (-1 + 1.5) - (-3 + 2)
    assert float(losses.ipo(policy, frozen, beta=0.5)) == pytest.approx((gap - 1) ** 2, rel=1e-12)
    simpo = -math.log(sigmoid(2.0 * (-1 + 3) - 0.5))
    assert float(losses.simpo(policy, [], beta=2.0, gamma=0.5)) == pytest.approx(simpo, rel=1e-12)

    def odds(p):
        return p / (1 - p)

    ratio = math.log(odds(math.exp(-1)) / odds(math.exp(-3)))
    orpo = (3 + 1 + 1) / 3 - 0.2 * math.log(sigmoid(ratio))
    assert float(losses.orpo(policy, [], beta=0.2)) == pytest.approx(orpo, rel=1e-12)
    assert float(losses.sft([row(completion=[-1.0, -2.0]), row(completion=[-6.0])], [])) == pytest.approx(3.0)

    rated = [
        row(True, completion=[-1.0], mismatched=[-2.0]),
        row(False, completion=[-2.0], mismatched=[-1.0]),
    ]
    before = [
        row(True, completion=[-2.0], mismatched=[-3.0]),
        row(False, completion=[-1.0], mismatched=[-1.5]),
    ]
    kl = (1.0 + 0.5) / 2
    wanted = (1.5 * (1 - sigmoid(0.1 * (1 - kl))) + 0.5 * (1 - sigmoid(0.1 * (kl + 1)))) / 2
    found = losses.kto(rated, before, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    assert float(found) == pytest.approx(wanted, rel=1e-12)

    scored = [losses.Row(score={"chosen": torch.tensor(1.0), "rejected": torch.tensor(-0.5)})]
    wanted = -math.log(sigmoid(1.5)) + 0.1 * 0.25
    assert float(losses.reward(scored, [], center_rewards_coefficient=0.1)) == pytest.approx(wanted, rel=1e-6)

    two = [row(completion=[-1.0, -1.0]), row(completion=[-2.0])]
    old = [row(completion=[-1.0, -2.0]), row(completion=[-2.0])]
    k = math.exp(-1) + 1 - 1  # exp(d) - d - 1 for d = -1
    tokens = {"grpo": ((-1 + 0.1 * k / 2) + 0.5) / 2}
    tokens["bnpo"] = (-1 - 1 + 0.1 * k + 0.5) / 3
    tokens["dapo"] = tokens["bnpo"]
    tokens["dr_grpo"] = (-1 - 1 + 0.1 * k + 0.5) / (2 * 8)
    for name, wanted in tokens.items():
        found = losses.grpo(
            two,
            old,
            advantages=torch.tensor([1.0, -0.5]),
            beta=0.1,
            loss_type=name,
            max_completion_length=8,
        )
        assert float(found) == pytest.approx(wanted, rel=1e-6)
