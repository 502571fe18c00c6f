"""No secret is written down."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from makd_llm import cli
from makd_llm.checkpoint.folder import TensorReader, read_config
from makd_llm.config import load_config
from makd_llm.errors import UserError
from makd_llm.models.source import load_tokenizer
from makd_llm.redaction import names_a_secret, without_secrets, without_secrets_in
from makd_llm.train.deepspeed_config import read_deepspeed_config

SECRET = "s3cret-v4lue"


@pytest.mark.parametrize(
    "text",
    [
        f"token={SECRET}",
        f"HF_TOKEN={SECRET}",
        f"--api-key={SECRET}",
        f'{{"api_key": "{SECRET}"}}',
        f"cannot reach http://user:{SECRET}@proxy.example:3128/x",
        f"https://{SECRET}@example.org",
        f"Authorization: Bearer {SECRET}",
        f"password: {SECRET}",
        f"PGPASSWORD={SECRET}",
        f"DB_PASS={SECRET}",
        f"passphrase={SECRET}",
        f'{{"accessToken":"{SECRET}"}}',
        f'{{\\"api_key\\": \\"{SECRET}\\"}}',
        f"('token', '{SECRET}')",
        f"[(b'X-Api-Key', b'{SECRET}')]",
        f"('authorization', 'Token {SECRET}')",
        f"Authorization: Token {SECRET}",
        f"{{'Authorization': 'Key {SECRET} and {SECRET}'}}",
        f"'\\ntoken={SECRET}'",
        f"--url=-http://me:{SECRET}@host",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    shown = without_secrets(text)
    assert SECRET not in shown and "***" in shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('password="correct horse battery", port=1', 'password="***", port=1'),
        ("password='it\\'s a horse', port=1", "password='***', port=1"),
        ('password="correct horse bat', 'password="***'),  # a line that was cut short
        ("password=one,two;three port=1", "password=*** port=1"),
        ("postgres://u:p@ss@host/db", "postgres://***@host/db"),
        ("postgres://u:p/ss@host/db", "postgres://***@host/db"),
        ("git+https://u:p@host/a@v1.0", "git+https://***@host/a@v1.0"),
    ],
)
def test_it_is_hidden_as_a_whole_and_no_more(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "key",
    [
        "hf_abcdefghijklmnopqrst",
        "sk-abcdefghijklmnop1234",
        "ghp_abcdefghijklmnopqrstuv",
        "AKIA" * 5,
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
        "glpat-abcdefghij0123456789",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    ],
)
def test_keys_of_known_services_are_hidden_wherever_they_stand(key: str) -> None:
    assert key[:20] not in without_secrets(f"403 for {key} at once")


@pytest.mark.parametrize(
    "text",
    [
        "distil.train.steps=50",
        "tokens 12, tokens_per_second=3",
        "data.columns.id=key_number",
        "teacher.model=owner/tokenizer-of-keys",
        "https://example.org/a@b",
        "heads.key_value=1",
        "student.heads={key_value: 2}",
        "monkey=banana",
        "missing key: document",
        "1234.5 tokens/s",
        "max_new_tokens=64",
        "pass through, then a backward_pass=3 ms",
        "basic operations, without authorization, and no token",
        "items.sort(key=lambda item: item.name)",
        "known columns: ['token', 'password', 'id']",
        "https://example.org:8080/a@b",
        "PWD=/home/me OLDPWD=/tmp TOKENIZERS_PARALLELISM=false",
        "runs/mine/teacher/3f786850e387550fdab836ed7e6dc881de23001b/model.safetensors",
        "its SHA-256 is 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "the checkpoint task-0123456789abcdefghij of model-hf_small",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_a_command_line_may_give_the_value_in_the_next_word() -> None:
    command = ["makd", "--api-key", SECRET, "--hf_token", SECRET, "--out", "x", f"a.token={SECRET}"]
    shown = without_secrets_in(command)
    assert SECRET not in " ".join(shown)
    assert shown[:2] == ["makd", "--api-key"] and shown[5:7] == ["--out", "x"]
    assert without_secrets_in(["--password=correct horse", "a.key=b c", "seed=1"]) == [
        "--password=***",
        "a.key=***",
        "seed=1",
    ]


@pytest.mark.timeout(60)
def test_long_words_do_not_take_minutes() -> None:
    """As a pattern would that looks at the rest of a text from each of its letters."""
    for piece in ("a.", "http://", "http://a:", "('token", "password=", "://a@", "a_", "'"):
        without_secrets(piece * 20_000)


def test_names_of_secrets() -> None:
    assert all(map(names_a_secret, ["HF_TOKEN", "api_key", "--password", "AWS_SECRET", "key"]))
    more = ["PGPASSWORD", "DB_PASS", "SSH_PASSPHRASE", "MYSQL_PWD", "GITLAB_PAT", "accessToken"]
    assert all(map(names_a_secret, more))
    assert not any(map(names_a_secret, ["tokenizer", "key_value", "tokens", "monkey", "SCRATCH"]))
    assert not any(map(names_a_secret, ["PWD", "OLDPWD", "compass", "PATH", "max_new_tokens"]))


def test_a_config_cannot_ask_for_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is given would stand in config.yaml."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = tmp_path / "run.yaml"
    path.write_text("data: {prompt: {system: '${oc.env:HF_TOKEN}'}}")
    with pytest.raises(UserError, match="may be a secret") as caught:
        load_config(path, [])
    assert SECRET not in str(caught.value)
    path.write_text("run_dir: ${oc.env:SCRATCH}/runs/${oc.env:NOBODY,mine}")
    assert load_config(path, []).run_dir == Path("/scratch/me/runs/mine")
    path.write_text("run_dir: ${oc.env:NOBODY}/runs")
    with pytest.raises(UserError, match="'NOBODY' not found"):
        load_config(path, [])
    path.write_text("{seed: 1, data: {source: TOKEN}, run_dir: '${oc.env:HF_${data.source}}'}")
    with pytest.raises(UserError, match="may be a secret"):
        load_config(path, [])
    with pytest.raises(UserError, match="may be a secret"):
        load_config(None, ["run_dir=${oc.env:HF_TOKEN}"])


@pytest.mark.parametrize(
    "asked",
    [
        '${oc.env:"HF_TOKEN"}',
        "${oc.env:'HF_TOKEN'}",
        "${ oc.env : HF_TOKEN , none }",
        "${oc.env:HF_${data.source}}",
        '${oc.env:"${data.source}"}',
        "${oc.env:NOBODY,${oc.env:'HF_TOKEN'}}",
        "${oc.decode:'\"${oc.env:HF_TOKEN}\"'}",
        "${oc.env:PGPASSWORD}",
        "${oc.env:DB_PASS}",
        "${oc.env:SSH_PASSPHRASE}",
        "${oc.env:HTTPS_PROXY}",
        "${oc.env:UNSET_TOKEN}",
    ],
)
def test_however_the_name_is_written(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable whose name says nothing is refused for its value."""
    for name in ("HF_TOKEN", "PGPASSWORD", "DB_PASS", "SSH_PASSPHRASE"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}@proxy:1")
    source = "HF_TOKEN" if '"${data' in asked else "TOKEN"
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"run_dir": asked, "data": {"source": source}}))
    with pytest.raises(UserError, match=r"may be a secret, which the run folder") as caught:
        load_config(path, [])
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="may be a secret"):
        load_config(None, [f"data.source={source}", f"distil.preset={json.dumps(asked)}"])


def test_only_configs_are_kept_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user of omegaconf in this process finds its resolver as it was."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for override in ("run_dir=x", "run_dir=${oc.env:HF_TOKEN}"):
        with suppress(UserError):
            load_config(None, [override])
        assert OmegaConf.create({"a": "${oc.env:HF_TOKEN}"}).a == SECRET


def test_deepspeeds_json_may_not_hold_one(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"comet": {"enabled": True, "api_key": SECRET}, "optimizer": {}}))
    with pytest.raises(UserError, match=r"comet.api_key would be written") as caught:
        read_deepspeed_config(path)
    assert SECRET not in str(caught.value)


def test_the_line_that_a_command_ends_with_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise UserError(f"no answer from http://me:{SECRET}@proxy:1 for token={SECRET}")

    monkeypatch.setattr(cli, "_run", refuse)
    with pytest.raises(SystemExit):
        cli.main(["train", "--ds", "x.json"])
    printed = capsys.readouterr()
    assert SECRET not in printed.err + printed.out and "no answer from" in printed.err


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_nor_has_the_traceback_of_a_defect(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        try:
            raise ValueError(f"token={SECRET}")
        except ValueError as cause:
            raise error(f"no answer from http://me:{SECRET}@proxy:1") from cause

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--ds", "x.json"])
    printed = capsys.readouterr()
    assert caught.value.code == 1 and SECRET not in printed.err + printed.out
    assert "Traceback" in printed.err and "http://***@proxy:1" in printed.err
    with pytest.raises(error, match=SECRET):
        cli.main(["train", "--ds", "x.json", "--debug"])


def test_environment_json_has_the_command_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from makd_llm.pipeline import _environment

    monkeypatch.setattr("sys.argv", ["makd", "train", f"--api-key={SECRET}", "seed=1"])
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}@proxy:1")
    found = json.dumps(_environment())
    assert SECRET not in found and "seed=1" in found


HARM = "import pathlib; pathlib.Path({path!r}).touch()\n"


@pytest.fixture
def foreign(tiny: Path, tmp_path: Path) -> Path:
    """A model folder whose config asks for code of its own."""
    import shutil

    folder = tmp_path / "foreign"
    shutil.copytree(tiny / "teacher", folder)
    (folder / "modeling_foreign.py").write_text(HARM.format(path=str(tmp_path / "done")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "modeling_foreign.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "Foreign",
        "auto_map": {"AutoTokenizer": ["modeling_foreign.Tokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_code_of_a_model_folder_is_never_run(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even after a question on a terminal, which transformers would ask."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be read as a model's config"):
        read_config(foreign)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(foreign)
    assert not (tmp_path / "done").exists()


def test_an_index_cannot_name_weights_elsewhere(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file of this folder"):
        TensorReader(folder)


def test_a_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    from makd_llm.models.source import resolve_model

    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        resolve_model(str(tmp_path))
