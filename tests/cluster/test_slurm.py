"""What a rank makes of srun's variables, and the batch script: what it asks for, what it runs, and
what it does at the end. Commands of SLURM are stand-ins here; tests/slurm has the real ones.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from makd_llm.cli import main
from makd_llm.cluster.slurm import SCRIPT, Job, first_host, port_of, render, rendezvous
from makd_llm.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
ZERO3 = str(CHECKOUT / "ds_configs" / "zero3.json")
TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003,005-006]",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
}


def test_a_task_of_srun_learns_its_place() -> None:
    assert rendezvous(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "20345",
    }
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400"}
    assert rendezvous(TASK | given).items() >= given.items()


@pytest.mark.parametrize(
    ("more", "local_rank"),
    [({"CUDA_VISIBLE_DEVICES": "2"}, "0"), ({"CUDA_VISIBLE_DEVICES": "0,1"}, "1"), ({}, "1")],
)
def test_a_task_that_is_bound_to_one_gpu_takes_the_one_it_sees(
    more: dict[str, str], local_rank: str
) -> None:
    assert rendezvous(TASK | more)["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script itself
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"RANK": "3"},  # torchrun or deepspeed, which srun has started
    ],
)
def test_who_is_no_task_among_several_is_left_alone(environment: dict[str, str]) -> None:
    assert rendezvous(environment) == {}


@pytest.mark.parametrize(
    "wrong", [{"SLURM_JOB_ID": "x"}, {"SLURM_STEP_ID": "batch"}, {"SLURM_LOCALID": None}]
)
def test_what_is_missing_from_the_variables_is_named(wrong: dict[str, str | None]) -> None:
    broken = {name: value for name, value in (TASK | wrong).items() if value is not None}
    with pytest.raises(UserError, match="cannot be read"):
        rendezvous(broken)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003,005-007]-ib,login1", "gpu003-ib"),
        ("login1,gpu[003-007]", "login1"),
        ("rack[1-2]n[08,10]", "rack1n08"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_neighbouring_jobs_and_steps_have_ports_of_their_own() -> None:
    ports = {port_of(job, 0) for job in range(5000, 17000)}
    assert len(ports) == 12000 and min(ports) == 20000 and max(ports) == 31999
    assert len({port_of(job, step) for job in range(10) for step in range(10)}) == 100


def run_script(
    tmp_path: Path, script: str, *arguments: str, code: int = 0, **environment: str
) -> tuple[int, list[list[str]], str]:
    """Runs a batch script as sbatch would, with stand-ins for SLURM's commands. Its exit code, what
    srun, module and scontrol requeue were called with, and what it printed.
    """
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    calls.write_text("")
    note = f'{shlex.quote(sys.executable)} -c "import json, sys; print(json.dumps(sys.argv[1:]))"'
    scontrol = f"""case $1 in
    show) echo n1; echo n2 ;;
    -o) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=$4" ;;
    *) {note} scontrol "$@" >>{calls}; exit ${{REFUSES-0}} ;;
    esac"""
    seen = (
        f'{shlex.quote(sys.executable)} -c "import json, os; print(json.dumps({{**os.environ}}))"'
    )
    for name, body in {
        "srun": f'{note} srun "$@" >>{calls}; {seen} >{tmp_path}/seen; exit {code}',
        "scontrol": scontrol,
        "module": f'{note} module "$@" >>{calls}',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    path = tmp_path / "script"
    path.write_text(script)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        ["bash", str(path), *arguments],
        env=os.environ | job | environment | {"PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    called = [json.loads(line) for line in calls.read_text().splitlines()]
    return done.returncode, called, done.stdout + done.stderr


def ranks_command(called: list[list[str]]) -> list[str]:
    """What srun was to run, without its own options."""
    (srun,) = (call for call in called if call[0] == "srun")
    return [word for word in srun[1:] if not word.startswith(("--kill-on", "--wait="))]


def test_the_script_as_it_stands_runs_what_it_is_given(tmp_path: Path) -> None:
    code, called, printed = run_script(tmp_path, SCRIPT.read_text(), "--ds", "z.json", "a.b=c d")
    assert code == 0, printed
    command = ["python", "-m", "makd_llm.cli", "train", "--ds", "z.json", "a.b=c d"]
    assert ranks_command(called) == command
    assert (CHECKOUT / "slurm" / "distil.sbatch").resolve() == SCRIPT


@pytest.mark.parametrize(("code", "again"), [(75, True), (143, True), (0, False), (74, False)])
def test_only_what_was_stopped_by_a_signal_is_queued_again(
    tmp_path: Path, code: int, again: bool
) -> None:
    ended, called, _ = run_script(tmp_path, render(Job(("--ds", "z.json"))), code=code)
    assert ended == code
    assert (["scontrol", "requeue", "7"] in called) == again


def test_a_task_of_an_array_is_queued_again_by_itself(tmp_path: Path) -> None:
    """By its job's number alone SLURM would take the last task for the whole array."""
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    sweep = render(Job(("--ds", "z"), configs=("a.yaml",), seeds=(0, 1, 2, 3)))
    _, called, printed = run_script(tmp_path, sweep, code=75, **task)
    assert ["scontrol", "requeue", "7_3"] in called
    assert "job 7_3 goes back into the queue" in printed


def test_where_slurm_does_not_queue_it_again_it_says_so(tmp_path: Path) -> None:
    code, _, printed = run_script(tmp_path, render(Job(("--ds", "z"))), code=75, REFUSES="1")
    assert code == 75
    assert "makd: job 7 was not taken back: submit it again" in printed


def test_variables_for_the_ranks_outrule_the_scripts_own(tmp_path: Path) -> None:
    given = {"MASTER_PORT": "29999", "MASTER_ADDR": "10.9.9.9", "OMP_NUM_THREADS": "8"}
    by_hand = {"MAKD_VARIABLES": " ".join(f"{name}={value}" for name, value in given.items())}
    rendered = render(Job(("--ds", "z"), variables=tuple(given.items())))
    for script, environment in ((rendered, {}), (SCRIPT.read_text(), by_hand)):
        run_script(tmp_path, script, "--ds", "z", **environment)
        seen = json.loads((tmp_path / "seen").read_text())
        assert {name: seen[name] for name in given} == given
    run_script(tmp_path, SCRIPT.read_text(), MASTER_PORT="29999", RANK="4")
    seen = json.loads((tmp_path / "seen").read_text())
    assert not {"MASTER_PORT", "RANK"} & set(seen), "left over where sbatch was called"
    assert (seen["MASTER_ADDR"], seen["OMP_NUM_THREADS"]) == ("10.1.2.3", "1")


def test_whatever_is_in_an_argument_arrives_as_it_is(tmp_path: Path) -> None:
    trap = tmp_path / "made"
    nasty = f"""run_dir=a b'c"$(touch {trap})`touch {trap}`;touch {trap}\n# end of settings"""
    job = Job(("--ds", nasty), venv="", python="py thon", variables=(("A", nasty),))
    script = render(job)
    _, called, printed = run_script(tmp_path, script)
    assert ranks_command(called) == ["py thon", "-m", "makd_llm.cli", "train", "--ds", nasty]
    assert not trap.exists(), printed


def test_each_task_of_a_sweep_has_its_config_seed_and_folder(tmp_path: Path) -> None:
    sweep = Job(("--ds", "z"), configs=("c/a.yaml", "b.yml"), seeds=(3, 5), runs="runs/s")
    script = render(replace(sweep, at_once=2))
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --output=%x-%A_%a.log\n" in script
    found = []
    for task in range(4):
        _, called, _ = run_script(tmp_path, script, SLURM_ARRAY_TASK_ID=str(task))
        found.append(ranks_command(called)[6:])
    assert found == [
        ["--config", "c/a.yaml", "seed=3", "run_dir=runs/s/a-seed3"],
        ["--config", "c/a.yaml", "seed=5", "run_dir=runs/s/a-seed5"],
        ["--config", "b.yml", "seed=3", "run_dir=runs/s/b-seed3"],
        ["--config", "b.yml", "seed=5", "run_dir=runs/s/b-seed5"],
    ]
    by_hand = {"MAKD_CONFIGS": "c/a.yaml b.yml", "MAKD_SEEDS": "3 5", "MAKD_RUNS": "runs/s"}
    _, called, _ = run_script(
        tmp_path, SCRIPT.read_text(), "--ds", "z", SLURM_ARRAY_TASK_ID="2", **by_hand
    )
    assert ranks_command(called)[6:] == found[2]
    code, called, printed = run_script(tmp_path, script, SLURM_ARRAY_TASK_ID="4")
    assert (code, called) == (2, []) and "array task 4, but there are 2 configs x 2" in printed


def test_modules_a_virtual_environment_and_containers(tmp_path: Path) -> None:
    (tmp_path / "my env" / "bin").mkdir(parents=True)
    (tmp_path / "my env" / "bin" / "activate").write_text("export FOUND=1\n")
    job = Job(("--ds", "z"), modules=("cuda/12.4", "gcc"), venv=str(tmp_path / "my env"))
    _, called, printed = run_script(tmp_path, render(job))
    assert called[0] == ["module", "load", "cuda/12.4", "gcc"], printed
    assert ranks_command(called)[0] == "python"
    _, called, _ = run_script(tmp_path, render(Job(("--ds", "z"), container="i.sif")))
    here = os.getcwd()
    inside = ["apptainer", "exec", "--nv", "--bind", here, "--pwd", here, "i.sif", "python"]
    assert ranks_command(called)[:9] == inside
    _, called, _ = run_script(
        tmp_path, render(Job(("--ds", "z"), container="a/b:c", runner="pyxis"))
    )
    assert ranks_command(called)[:4] == [
        "--container-image=a/b:c",
        f"--container-mounts={here}:{here}",
        f"--container-workdir={here}",
        "python",
    ]
    code, called, _ = run_script(tmp_path, render(Job((), venv="/no/such")))
    assert (code, called) == (2, []), "what cannot be activated is not gone without"


def test_gpus_are_seen_by_all_ranks_of_a_node(tmp_path: Path) -> None:
    script = render(Job(("--ds", "z"), nodes=2, ranks=8, gpus=8))
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in script
    _, called, _ = run_script(tmp_path, script, SLURM_GPUS_ON_NODE="8")
    assert "--gpu-bind=none" in ranks_command(called)


@pytest.mark.parametrize(
    "option", ["--comment=a b", "--x=$(y)", "--x=a\n#SBATCH --y", "partition=x", "--x='y'"]
)
def test_what_an_sbatch_line_cannot_carry_is_refused(option: str) -> None:
    with pytest.raises(UserError, match="no option that an #SBATCH line can carry"):
        render(Job((), options=(option,)))


def test_submit_prints_with_dry_run_and_hands_over_without(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("seed: 1\n")
    call = ["slurm", "submit", "--ds", ZERO3, "--config", str(config), "--nodes", "2"]
    call += ["--env", "NCCL_SOCKET_IFNAME=ib0"]
    call += ["--gpus", "4", "--sbatch=--time=1:00:00", "distil.train.batch_size=16", "run_dir=x y"]
    main([*call, "--dry-run"])
    printed = capsys.readouterr().out
    wanted = ["--nodes=2", "--ntasks-per-node=4", "--signal=TERM@120", "--time=1:00:00"]
    assert all(f"#SBATCH {option}\n" in printed for option in wanted)
    assert "variables=(NCCL_SOCKET_IFNAME=ib0)\n" in printed
    assert "'run_dir=x y'" in printed and f"python={sys.executable}\n" in printed
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ncat >{tmp_path}/handed; echo '41;somewhere'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    main(call)
    assert capsys.readouterr().out == "submitted: job 41\n"
    assert (tmp_path / "handed").read_text() == printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "no sbatch found"),
        (["--ranks", "3", "distil.train.batch_size=16"], "16"),
        (["studnet.x=1"], "did you mean student?"),
        (["--seed", "1", "seed=4"], "seed=4: a sweep has its own"),
        (["--config", "other/mine.yaml"], "two --config are called mine"),
        (["--runner", "docker"], "--runner docker: not one of apptainer"),
        (["--container", "i", "--venv", "v"], "--container and --venv"),
        (["--env", "x"], "--env x: not of the form NAME=VALUE"),
        (["--env", "a b=c"], "'a b' is no name of a variable"),
        (["evaluation.max_new_tokens=5000"], "half the window"),
        (["--env", "HF_TOKEN=s3cret"], "--env HF_TOKEN looks like a secret"),
        (["--env", "HTTPS_PROXY=http://me:s3cret@p:1"], "--env HTTPS_PROXY looks like a secret"),
        (["--sbatch=--export=ALL,DB_PASS=s3cret"], "environment, which sbatch hands on by itself"),
        (["--sbatch=time=1"], "no option that an #SBATCH line"),
        (["--until", "dinner"], "--until dinner: not one of"),
    ],
)
def test_wrong_submissions_end_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    words: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit) as caught:
        main(["slurm", "submit", "--ds", ZERO3, "--config", str(tmp_path / "mine.yaml"), *more])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert words in line and "s3cret" not in line + printed.out


def test_a_sweep_without_a_config_and_a_refusal_of_sbatch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, words in (
        (["studnet.x=1"], "did you mean student?"),
        (["--seed", "1"], "--config is missing; a sweep's run folders have its name"),
        ([], "sbatch refused the job: sbatch: error: invalid partition no such queue"),
    ):
        sbatch = tmp_path / "sbatch"
        sbatch.write_text(
            "#!/bin/sh\necho 'sbatch: error: invalid partition\nno such queue' >&2; exit 1\n"
        )
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(SystemExit) as caught:
            main(["slurm", "submit", "--ds", ZERO3, *arguments])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line


def test_each_task_of_a_comparison_makes_the_row_of_its_number(tmp_path: Path) -> None:
    by_hand = {"MAKD_COMMAND": "compare"}
    rendered = render(Job(("c.yaml",), command="compare", rows=(0, 1, 2, 5, 7, 8), at_once=2))
    assert "#SBATCH --array=0-2,5,7-8%2" in rendered
    for script, arguments in ((SCRIPT.read_text(), ["c.yaml"]), (rendered, [])):
        for task, more in (("5", ["--row", "5"]), (None, [])):
            array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": task} if task else {}
            code, called, printed = run_script(tmp_path, script, *arguments, **by_hand, **array)
            assert code == 0, printed
            assert ranks_command(called)[1:] == ["-m", "makd_llm.cli", "compare", "c.yaml", *more]


def test_a_comparison_is_two_jobs_and_the_second_waits(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"""
name: small
folder: {tmp_path}/made
ds: {ZERO3}
keep_ratios: [0.5]
seeds: [0, 1]
against: [kd]
run:
  teacher: {{model: {tiny}/teacher}}
  data: {{source: {tiny}, max_length: 64}}
  student: {{rank_multiple: 4}}
  evaluation: {{max_new_tokens: 4}}
rows:
  kd: {{distil: {{preset: kd}}}}
  makd: {{distil: {{preset: makd}}}}
""")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f"#!/bin/sh\nn=$(ls {tmp_path} | grep -c job)\ncat >{tmp_path}/job$n\necho 4$n\n"
    )
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    call = [
        "slurm",
        "compare",
        str(config),
        "--gpus",
        "2",
        "--rows",
        "makd",
        "distil.train.steps=9",
    ]
    main(call)
    printed = capsys.readouterr().out
    assert printed == "submitted: job 40, what the rows share\nsubmitted: job 41, 2 rows\n"
    first, second = ((tmp_path / f"job{n}").read_text() for n in (0, 1))
    assert "--prepare" in first and "--array" not in first and "command=compare" in first
    assert "#SBATCH --array=1,3" in second and "--prepare" not in second
    assert "#SBATCH --dependency=afterok:40" in second
    for script in (first, second):
        assert "--ntasks-per-node=2" in script and "distil.train.steps=9" in script
    with pytest.raises(SystemExit) as ended:
        main([*call, "distil.train.batch_size=3"])
    assert ended.value.code == 2
    assert "shared/keep0.5: " in capsys.readouterr().err, "said before anything is queued"
