"""task=ppo: what is descended, what is rewarded, what an interruption leaves, and that it learns. TRL's own loop."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EOS, PAD = 2, 0
TEXTS = [
    "The lamp is lit",
    "How do I boil an egg?",
    "Count six and a half minutes",
    "cold water, quick",
    "def add(a, b):",
    "quick",
    "The keeper writes his log so that the yolk stays soft",
    "The log",
    "How do I",
    "minutes, then cold",
    "so that the yolk",
]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.fixture(scope="module")
def policy_folder(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with answers that end: one direction in all embeddings, and more of it in the end's."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = tmp_path_factory.mktemp("policy") / "llama"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 5
        model.get_input_embeddings().weight[:, 0] += 0.5
        model.get_input_embeddings().weight[EOS, 0] += 0.5
    # What models come with. Log-probabilities of penalised logits are not those that an update computes.
    model.generation_config = GenerationConfig(eos_token_id=[EOS, 7], repetition_penalty=1.4)
    model.save_pretrained(folder)
    return folder


def classifier(seed: int, **settings: Any) -> Any:
    """A random model with one score, which differs well between answers."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**{"vocab_size": 600, "num_labels": 1, "pad_token_id": PAD} | small | settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight, std=0.3)
    return model


@pytest.fixture
def make(policy_folder, tmp_path, one_process) -> Callable[..., Any]:  # noqa: ARG001
    """`make(r=4, learning_rate=1e-2)`: the trainer as soup builds it; without `r` all weights train."""

    def made(*, r=None, prompts=CHATS, reward=None, name="checkpoints", **arguments):
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
        from trl.experimental.ppo import PPOConfig

        from soup.train.ppo import PPO
        from soup.train.trainer import Resumable

        set_seed(3)
        settings = {
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_steps": 1000,
            "seed": 3,
            "data_seed": 5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "response_length": 8,
            "temperature": 0.7,
            "learning_rate": 1e-3,
            "num_ppo_epochs": 3,
        }
        modules = None if r is None else LoraConfig(r=r, task_type="CAUSAL_LM", target_modules="all-linear")
        trainer = type("PPO", (Resumable, PPO), {})(
            model=AutoModelForCausalLM.from_pretrained(policy_folder),
            args=PPOConfig(output_dir=str(tmp_path / name), **settings | arguments),
            train_dataset=Dataset.from_list([{"prompt": one, "solution": "none"} for one in prompts]),
            eval_dataset=None,
            processing_class=AutoTokenizer.from_pretrained(policy_folder),
            peft_config=modules,
            reward_model=(reward or classifier(1)).requires_grad_(False),
            value_model=classifier(2),
            ref_model=None if r is not None else AutoModelForCausalLM.from_pretrained(policy_folder),
        )
        trainer.metrics_file = tmp_path / name / "metrics.jsonl"
        return trainer

    return made


class Seen:
    """What TRL's loop holds at each backward, and the models as they were when answers were drawn, in float64."""

    def __init__(self, trainer: Any):
        self.trainer, self.backwards = trainer, []
        backward = trainer.accelerator.backward

        def watched(loss: Any, **options: Any) -> None:
            held = sys._getframe(1).f_locals
            names = (
                "responses",
                "query_responses",
                "context_length",
                "rewards",
                "scores",
                "advantages",
                "returns",
            )
            names += ("logprobs", "values", "micro_batch_inds", "ppo_epoch_idx", "update")
            self.backwards.append(
                SimpleNamespace(**{name: deepcopy(held[name]) for name in names}, loss=loss.item())
            )
            self.backwards[-1].now = self.models()
            backward(loss, **options)

        trainer.accelerator.backward = watched
        self.drawn_by = self.models()

    def models(self) -> Any:
        """Copies without what PPO hung on them."""
        from transformers import AutoModelForCausalLM

        trainer = self.trainer
        policy = trainer.policy
        value = classifier(0)
        value.load_state_dict(trainer.value_model.state_dict())
        if trainer.is_peft_model:
            policy = deepcopy(policy).merge_and_unload()
        plain = AutoModelForCausalLM.from_config(policy.config)
        plain.load_state_dict(policy.state_dict())
        return SimpleNamespace(policy=plain.double().eval(), value=value.double().eval())


def answers(one: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row, without padding; the answer with the token that ends it."""
    rows = []
    for tokens in one.query_responses.tolist():
        prompt = [token for token in tokens[: one.context_length] if token != PAD]
        answer = tokens[one.context_length :]
        if EOS in answer:
            answer = answer[: answer.index(EOS) + 1]
        rows.append((prompt, answer))
    return rows


def logps(model: Any, prompt: list[int], answer: list[int], temperature: float) -> Any:
    """log p of each token of the answer, (T,), at the temperature that it was drawn with."""
    import torch

    logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / (temperature + 1e-7)
    return logits_TV.log_softmax(-1)[range(len(answer)), answer]


def head(model: Any, prompt: list[int], answer: list[int]) -> Any:
    """The head's number before each token of the answer and after the last, (T+1,)."""
    import torch

    hidden_TD = model.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 :]
    return model.score(hidden_TD)[:, 0]


@pytest.mark.parametrize("r", [None, 4], ids=["all weights", "adapters"])
def test_the_loss_is_ppos(make, policy_folder, r):
    """Clipped surrogate, clipped value loss and GAE, from each sequence alone and in float64, in every backward of
    two updates, whose second epoch has ratios beyond the clip. To 1e-4, relative to 1."""
    import torch
    from transformers import AutoModelForCausalLM

    trainer = make(
        r=r,
        max_steps=1,
        num_ppo_epochs=2,
        learning_rate=2e-2,
        vf_coef=0.3,
        gamma=0.9,
        lam=0.8,
        kl_coef=0.5,
        cliprange=0.1,
    )
    args, width = trainer.args, trainer.args.response_length
    seen = Seen(trainer)
    trainer.train()
    reference = AutoModelForCausalLM.from_pretrained(policy_folder).double()
    reward = classifier(1).double()
    rows = answers(seen.backwards[0])
    lengths = [len(answer) for _, answer in rows]
    assert min(lengths) < width == max(lengths), "answers that end, and one that is cut"
    assert len({len(prompt) for prompt, _ in rows}) > 1, "padded on the left"
    assert trainer.state.num_input_tokens_seen == sum(len(prompt + answer) for prompt, answer in rows)

    with torch.no_grad():
        old = [logps(seen.drawn_by.policy, *row, args.temperature) for row in rows]
        values, advantages, returns = [], [], []
        for (prompt, answer), drawn, rewards_T in zip(rows, old, seen.backwards[0].rewards, strict=True):
            n = len(answer)
            kl_T = drawn - logps(reference, prompt, answer, args.temperature)
            score = head(reward, prompt, answer)[-1]
            # An answer that ended is followed by a state of its own, in which the score is given.
            expected_T = torch.cat([-args.kl_coef * kl_T, torch.zeros(width + 1 - n)])[:width]
            expected_T[min(n, width - 1)] += score
            assert torch.allclose(rewards_T.double(), expected_T, atol=1e-5)
            value_T = head(seen.drawn_by.value, prompt, answer)[: min(n + 1, width)]
            values.append(value_T)
            advantage, following, backwards = 0.0, 0.0, []
            for reward_t, value_t in zip(expected_T[: len(value_T)].flip(0), value_T.flip(0), strict=True):
                advantage = reward_t + args.gamma * following - value_t + args.gamma * args.lam * advantage
                following = value_t
                backwards.append(advantage)
            returns.append(torch.stack(backwards[::-1]) + value_T)
            advantages.append(torch.stack(backwards[::-1])[:n])
        every = torch.cat(advantages)
        advantages = [(one - every.mean()) / (every.var() + 1e-8).sqrt() for one in advantages]

        clipped = 0
        assert len(seen.backwards) == 2 * args.gradient_accumulation_steps
        for one in seen.backwards:
            surrogate, errors = [], []
            for row in one.micro_batch_inds:
                ratio_T = (logps(one.now.policy, *rows[row], args.temperature) - old[row]).exp()
                bounded_T = ratio_T.clamp(1 - args.cliprange, 1 + args.cliprange)
                clipped += int((ratio_T != bounded_T).sum())
                surrogate.append(torch.min(advantages[row] * ratio_T, advantages[row] * bounded_T))
                value_T, was_T = head(one.now.value, *rows[row])[: len(values[row])], values[row]
                near_T = was_T + (value_T - was_T).clamp(-args.cliprange_value, args.cliprange_value)
                errors.append(torch.max((value_T - returns[row]) ** 2, (near_T - returns[row]) ** 2))
            loss = -torch.cat(surrogate).mean() + args.vf_coef * torch.cat(errors).mean() / 2
            assert one.loss == pytest.approx(loss.item(), abs=1e-4, rel=1e-4)
    assert clipped > 5
    logged = trainer.state.log_history[-1]
    mean = sum(one.loss for one in seen.backwards) / len(seen.backwards)
    assert logged["loss"] == pytest.approx(mean, rel=1e-5)


def test_rows_come_in_the_data_seeds_order(make):
    """Epoch e is the permutation of data_seed + e, short of what fills no update; a probe's copy disturbs nothing."""
    import torch

    trainer = make(num_train_epochs=2.5, num_ppo_epochs=1)
    assert (trainer.updates, trainer.args.num_total_batches) == (5, 5)
    assert trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1] == 5
    order = [torch.randperm(11, generator=torch.Generator().manual_seed(5 + epoch)) for epoch in range(3)]
    state = torch.get_rng_state()
    assert list(deepcopy(trainer.get_train_dataloader().batch_sampler)) == [
        order[0][:4].tolist(),
        order[0][4:8].tolist(),
    ]
    loader = iter(trainer.get_train_dataloader())
    next(loader)
    assert torch.equal(torch.get_rng_state(), state), "epochs draw nothing from the generator of answers"
    trainer.order.given = 0

    taken = []
    collate = trainer.dataloader.collate_fn
    trainer.dataloader.collate_fn = lambda rows: (
        taken.append([row["prompt"] for row in rows]) or collate(rows)
    )
    trainer.train()
    assert taken == [
        [CHATS[row] for row in order[epoch][start : start + 4]]
        for epoch, start in ((0, 0), (0, 4), (1, 0), (1, 4), (2, 0))
    ]
    assert trainer.state.epoch == 2.5
    assert trainer.state.num_train_epochs == 3


def test_gradients_are_accumulated_and_clipped(make):
    """Every optimizer step, at the end of an epoch too, is one of the whole batch, with a gradient of the norm asked
    for at most; the logged norm is the one before."""
    import torch

    trainer = make(max_steps=4, max_grad_norm=0.125, num_ppo_epochs=2)
    norms = []
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.model.parameters()])).item()
        )
    )
    trainer.train()
    assert norms == pytest.approx([0.125] * 4 * 2, rel=1e-4)
    assert all(line["grad_norm"] > 0.5 for line in trainer.state.log_history)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {8}

    free = make(max_steps=1, max_grad_norm=0.0, name="free")
    free.train()
    assert free.state.log_history[0]["grad_norm"] > 0.5


def test_gradient_checkpointing_changes_no_number(make):
    runs = []
    for on in (False, True):
        trainer = make(
            r=4,
            max_steps=2,
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            name=str(on),
        )
        recomputed = 0
        layer = trainer.policy.get_base_model().model.layers[0].mlp

        def count(*_):
            nonlocal recomputed
            recomputed += 1

        layer.register_forward_pre_hook(count)
        trainer.train()
        runs.append((trainer.state.log_history, recomputed))
    (plain, passes), (checkpointed, more) = runs
    assert checkpointed == plain
    assert more == passes + 2 * 3 * 2, "each micro-batch of each update and PPO epoch passes once more"


@pytest.mark.parametrize("r", [None, 4], ids=["all weights", "adapters"])
def test_answers_are_scored_in_the_precision_of_the_update(make, r):
    """With bfloat16 products the policy that answered is the policy that is updated first: the ratio starts at 1, and
    a policy that equals its reference is at no distance from it."""
    import torch

    trainer = make(r=r, max_steps=1, num_ppo_epochs=1, gradient_accumulation_steps=4, bf16=True)
    products = set()
    for model in (trainer.policy, trainer.value_model, trainer.reward_model):
        projection = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
        projection.register_forward_hook(lambda _module, _args, output: products.add(output.dtype))
    trainer.train()
    assert products == {torch.bfloat16}
    (line,) = trainer.state.log_history
    assert abs(line["objective/kl"]) < 0.02
    assert line["policy/approxkl_avg"] < 1e-5
    assert line["val/ratio"] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["text", "messages"])
def test_prompts_are_tokenised_and_padded_beside_the_text(make, policy_folder, prompts):
    """Where the tokenizer pads with the end of text, or with what stands in prompts, another token is taken."""
    from transformers import AutoTokenizer

    trainer = make(max_steps=1, prompts=prompts)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[6]])
    assert set(batch) == {"input_ids"}
    for row, prompt in zip(batch["input_ids"].tolist(), (prompts[0], prompts[6]), strict=True):
        expected = (
            tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        )
        assert row == [PAD] * (len(row) - len(expected)) + expected


def test_padding_is_no_token_that_means_something(policy_folder):
    from transformers import AutoTokenizer

    from soup.errors import Refused
    from soup.train.ppo import _padding

    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    tokenizer.pad_token = tokenizer.eos_token  # as many tokenizers come, and as soup fills in
    assert _padding(tokenizer, [[1, 5, 2, 9]], 600) == "<|endoftext|>"
    assert _padding(tokenizer, [[0, 5, 2, 9]], 600) == "<|im_start|>"
    with pytest.raises(Refused, match="none can be padding"):
        _padding(tokenizer, [[0, 1, 5]], 600)


@pytest.mark.parametrize("r", [None, 4], ids=["all weights", "adapters"])
def test_the_saved_model_is_the_policy(make, policy_folder, tmp_path, r):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    trainer = make(r=r, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    kind = AutoModelForCausalLM if r is None else AutoPeftModelForCausalLM
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        saved, live, before = (
            model.eval()(ids).logits
            for model in (
                kind.from_pretrained(tmp_path / "model"),
                trainer.policy,
                AutoModelForCausalLM.from_pretrained(policy_folder),
            )
        )
    assert torch.equal(saved, live)
    assert (saved - before).abs().max() > 1e-2
    if r is None:
        settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
        assert (settings["eos_token_id"], settings["repetition_penalty"]) == ([EOS, 7], 1.4)


class Killed(Exception):
    pass


@pytest.fixture
def run(make, tmp_path):
    """`run(name, arguments, stop=4)`: trains in the run folder `name` until the end, a wish to stop or a kill."""

    def trained(
        name: str, arguments: dict[str, Any], *, stop: int | None = None, kill: int | None = None
    ) -> Any:
        from transformers import TrainerCallback

        from soup.record import Run
        from soup.train.callbacks import Loop, Recorder
        from soup.train.stopper import Stopper
        from soup.train.trainer import cut_metrics

        record = Run(tmp_path / name)
        trainer = make(name=f"{name}/checkpoints", **arguments)
        trainer.metrics_file = record.metrics
        checkpoint = record.last_checkpoint()
        cut_metrics(record.metrics, checkpoint)
        stopper = Stopper()

        class Interruption(TrainerCallback):
            def on_step_end(self, args, state, control, **_):  # noqa: ARG002
                if state.global_step == kill:
                    raise Killed
                if state.global_step == stop:
                    stopper.asked = "SIGTERM"

        display = SimpleNamespace(**dict.fromkeys(("step", "log", "stop"), lambda *_: None))
        display.start = lambda *steps: setattr(trainer, "shown", steps)
        for callback in (Interruption(), Loop(trainer, stopper, checkpoint), Recorder(record, display, ())):
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Killed:
            assert kill is not None
        return trainer, record

    return trained


INTERRUPTED = {
    "adapters": {"r": 4, "prompts": TEXTS, "gradient_accumulation_steps": 2, "logging_steps": 3},
    "all weights": {"gradient_accumulation_steps": 1, "logging_steps": 2, "weight_decay": 0.1},
}


@pytest.mark.parametrize("arguments", INTERRUPTED.values(), ids=INTERRUPTED)
def test_resumed_equals_uninterrupted(run, arguments):
    """Killed between two checkpoints and stopped between two logs: weights, value weights, optimizer, schedule,
    generators and metrics are those of the run left alone, bit for bit, over several epochs of the data."""
    arguments = arguments | {
        "max_steps": 11,
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "learning_rate": 5e-3,
    }
    alone, undisturbed = run("alone", arguments)
    assert alone.state.epoch > 2

    _, broken = run("broken", arguments, kill=5)
    assert broken.last_checkpoint().name == "checkpoint-3"
    stopped, _ = run("broken", arguments, stop=7)
    assert (stopped.state.global_step, stopped.state.episode) == (7, 7 * stopped.args.batch_size)
    assert broken.last_checkpoint().name == "checkpoint-7"
    resumed, _ = run("broken", arguments)
    assert (alone.shown, stopped.shown, resumed.shown) == ((11, 0), (11, 3), (11, 7))

    assert equal(alone.policy.state_dict(), resumed.policy.state_dict())
    assert equal(alone.value_model.state_dict(), resumed.value_model.state_dict())
    assert equal(alone.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert equal(alone.lr_scheduler.state_dict(), resumed.lr_scheduler.state_dict())
    assert lines(undisturbed) == lines(broken)
    steps = [line["step"] for line in lines(broken)]
    assert steps == [*range(arguments["logging_steps"], 11, arguments["logging_steps"]), 11]
    assert all(math.isfinite(line[key]) for line in lines(broken) for key in ("loss", "lr", "grad_norm"))
    for file in ("rng_state.pth", "trainer_state.json", "value_model.safetensors"):
        one, other = (record.last_checkpoint() / file for record in (undisturbed, broken))
        assert one.read_bytes() == other.read_bytes(), file

    again, _ = run("broken", arguments)  # nothing is left to do
    assert equal(again.policy.state_dict(), alone.policy.state_dict())
    assert (again.state.global_step, again.state.max_steps) == (11, 11)
    assert lines(undisturbed) == lines(broken)


def equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def lines(record: Any) -> list[dict[str, Any]]:
    timed = ("tokens_per_s", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in timed} for line in record.lines()]


def frequent(tokens: Any) -> Any:
    """A classifier whose score grows with the share of `tokens` in what it reads: one layer, which averages."""
    import torch

    model = classifier(0, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embedding, layer = model.model.embed_tokens.weight, model.model.layers[0]
        embedding[:, 0] = 1.0  # a constant, which keeps the norms' divisors nearly so
        embedding[tokens, 1] = 0.1
        layer.self_attn.v_proj.weight[2, 1] = 1.0  # queries and keys are 0, so attention is a mean
        layer.self_attn.o_proj.weight[2, 2] = 1.0
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1.0)
        model.score.weight[0, 2] = 10.0
    return model


@pytest.mark.parametrize("r", [None, 8], ids=["all weights", "adapters"])
def test_it_learns_what_is_rewarded(make, policy_folder, r):
    """Tokens of one half of the vocabulary score. Within 30 updates of 8 answers the score of prompt and answer,
    which is half of its maximum of 8 at first, rises by 0.8, and the policy stays within 40 nats of its reference."""
    from statistics import mean

    from transformers import AutoModelForCausalLM

    embedding = AutoModelForCausalLM.from_pretrained(policy_folder).get_input_embeddings().weight
    trainer = make(
        r=r,
        max_steps=30,
        reward=frequent(embedding[:, 1] > 0),
        prompts=TEXTS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        response_length=12,
        learning_rate=3e-3 if r is None else 3e-2,
        kl_coef=0.01,
    )
    trainer.train()
    scores, kl = (
        [line[key] for line in trainer.state.log_history] for key in ("objective/scores", "objective/kl")
    )
    print(f"scores {mean(scores[:5]):.2f} to {mean(scores[-5:]):.2f}, KL at most {max(kl):.1f}")
    assert mean(scores[-5:]) > mean(scores[:5]) + 0.8
    assert max(kl) < 40


@pytest.fixture
def asked(tree, tiny_model):
    """`asked(reward_model, "lora=none")`: what soup gives the trainer for task=ppo."""

    def models(reward: Path, *overrides: str) -> dict[str, Any]:
        import torch

        from soup import device, schema
        from soup.model.load import precision
        from soup.train.extra import ppo_models

        config = schema.check(
            tree("task=ppo", f"task.reward_model={reward}", "model.dtype=float32", *overrides)
        )
        where = device.resolve("cpu")
        torch.manual_seed(11)
        given = ppo_models(config, tiny_model, precision(config.model, config.lora, where), where)
        torch.testing.assert_close(torch.initial_seed(), 11)
        before = torch.random.get_rng_state()
        torch.manual_seed(11)
        assert torch.equal(torch.random.get_rng_state(), before), (
            "adapters are drawn from the seed after this"
        )
        return given

    return models


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def test_models_that_ppo_is_given(asked, tiny_model, tmp_path):
    """Whole weights or an adapter, folded in; the value model starts as the reward model and shares nothing with it."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    whole = saved(tmp_path / "whole", classifier(5))
    given = asked(whole)
    assert given["ref_model"] is None
    reward, value = given["reward_model"], given["value_model"]
    assert equal(dict(reward.state_dict()), dict(classifier(5).state_dict()))
    assert equal(dict(value.state_dict()), dict(reward.state_dict()))
    assert {p.data_ptr() for p in value.parameters()}.isdisjoint(p.data_ptr() for p in reward.parameters())
    assert not any(p.requires_grad for p in reward.parameters())
    assert all(p.requires_grad for p in value.parameters())

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapter = saved(tmp_path / "adapter", adapted)
    ids = torch.arange(3, 40)[None]
    given = asked(adapter, "lora=none", f"task.value_model={whole}")
    assert not isinstance(given["reward_model"], PeftModel)
    with torch.no_grad():
        found, expected = given["reward_model"](ids).logits, adapted.eval()(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert equal(dict(given["value_model"].state_dict()), dict(classifier(5).state_dict()))
    assert not any(p.requires_grad for p in given["ref_model"].parameters())


def test_models_that_ppo_refuses(asked, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from soup.errors import Refused

    whole = saved(tmp_path / "run" / "model", classifier(5))
    beheaded = saved(tmp_path / "beheaded", classifier(5))
    weights = load_file(beheaded / "model.safetensors")
    save_file(
        {name: one for name, one in weights.items() if "score" not in name}, beheaded / "model.safetensors"
    )
    cut = saved(tmp_path / "cut", classifier(5))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    bare = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1),
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]),
    )
    headless = saved(tmp_path / "headless", bare)
    weights = load_file(headless / "adapter_model.safetensors")
    save_file(
        {name: one for name, one in weights.items() if "score" not in name},
        headless / "adapter_model.safetensors",
    )
    language = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    )
    baseless = saved(tmp_path / "baseless", bare)
    settings = json.loads((baseless / "adapter_config.json").read_text())
    (baseless / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    (tmp_path / "empty").mkdir()
    for folder, why in {
        tmp_path / "nowhere": "there is no such folder",
        tmp_path / "empty": "is no model folder",
        tmp_path / "run": "is a run, not its model",
        tiny_model: "holds no sequence classifier",
        saved(tmp_path / "language", language): "holds no sequence classifier",
        saved(tmp_path / "three", classifier(5, num_labels=3)): "classifies into 3",
        saved(
            tmp_path / "other", classifier(5, vocab_size=601)
        ): "has a vocabulary of 601, and the policy's has 600",
        beheaded: "has no weights for 1 of its tensors, score.weight among them",
        headless: "has no weights for base_model.model.score.weight",
        cut: "cannot be loaded",
        baseless: "cannot be loaded",
    }.items():
        with pytest.raises(Refused) as refused:
            asked(folder)
        (problem,) = refused.value.problems
        assert (problem.key, problem.value) == ("task.reward_model", str(folder))
        assert why in problem.why
        assert problem.fix.startswith("task.reward_model=")
    with pytest.raises(Refused) as refused:
        asked(whole, f"task.value_model={tiny_model}")
    assert refused.value.problems[0].key == "task.value_model"


def test_too_few_rows_for_an_update(make):
    from soup.errors import Refused

    with pytest.raises(Refused, match="an update takes 12 prompts, and there are 11"):
        make(per_device_train_batch_size=6)
