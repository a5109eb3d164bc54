"""Hundreds of wrong overrides, several to a line: one readable message each time, which names them all."""

import random

from omegaconf import OmegaConf

from soup.cli.loader import conf_dir

GOOD = (
    "lora.r=4",
    "task=dpo",
    "optim.lr=1e-5",
    "lora=dora",
    "training.seed=0",
    "run.name='a b'",
    "~run.name",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def _typo(random, word):
    place = random.randrange(len(word))
    letter = random.choice(LETTERS)
    return random.choice(
        [
            word[:place] + letter + word[place:],
            word[:place] + word[place + 1 :],
            word[:place] + letter + word[place + 1 :],
        ]
    )


def _wrong(random, keys, choices):
    key = random.choice(keys)
    value = random.choice(["8", "1e-4", "x y", "true", "null", "[]", "{a: 1}", "''", "-1", "ünï"])
    kind = random.randrange(8)
    if kind == 0:
        section, _, leaf = key.rpartition(".")
        return f"{section}.{_typo(random, leaf)}{random.choice('qx')}z={value}"
    if kind == 1:
        group, choice = random.choice(choices)
        return f"{group}={_typo(random, choice)}zq"
    if kind == 2:
        return f"{key}={random.choice('[{(')}{value}"
    if kind == 3:
        return f"{key}={value}={value}"
    if kind == 4:
        return f"{key}={random.choice(['1,2', 'range(1,3)', 'choice(a,b)', 'interval(0,1)', 'glob(*)'])}"
    if kind == 5:
        return f"{_typo(random, key)}.deeper.key={value}"
    if kind == 6:
        return f"~{key}zq"
    return f"+{key}=8"


def test_three_hundred_wrong_overrides(shell):
    generator = random.Random(20261123)
    tree = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    keys = [f"training.{key}" for key, value in tree["training"].items() if value is not None]
    choices = [(path.parent.name, path.stem) for path in conf_dir().glob("*/*.yaml")]
    for _ in range(20):
        wrong = [_wrong(generator, keys, choices) for _ in range(16)]
        flags = generator.choice([[], [], ["plan"], ["--cfg", "job"], ["why"]])
        line = [*wrong, *generator.sample(GOOD, generator.randint(0, 2))]
        generator.shuffle(line)
        result = shell.run(*flags, *line)
        assert result.status == 2, line
        assert result.out == "", line
        assert result.err.startswith("soup refuses"), line
        assert "Traceback" not in result.err, line
        for word in wrong:
            assert word.partition("=")[0] in result.err, (word, result.err)
    assert shell.calls == []
