"""The adapter to EleutherAI's evaluation harness: exact, and offline."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_prep.tokenizer import ByteTokenizer
from tests.evaluation.knowing import knowing
from tests.inference.checkpoints import config, write_checkpoint
from tests.models.shapes import tiny
from titans_train.__main__ import main
from titans_train.errors import UserError
from titans_train.evaluation.harness_task import PAPER, check, load, manager_of, names_of, offline
from titans_train.evaluation.scoring import Scorer
from titans_train.inference import sample_text
from titans_train.inference.sampling import Sampler
from titans_train.inference.source import find, load_checked
from titans_train.models import LanguageModel
from titans_train.parallel import Mesh, process_group

MISSING = "lm_eval is not installed: pip install 'titans-train[harness]'"
harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason=MISSING)
TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_document
Capture = pytest.CaptureFixture[str]


def answers(model: Any, kind: str, *arguments: tuple[Any, ...], batch: int = 3) -> list[Any]:
    """What the adapter answers to requests of lm_eval."""
    from lm_eval.api.instance import Instance

    from titans_train.evaluation.harness import HarnessModel

    requests = [Instance(kind, {}, given, n) for n, given in enumerate(arguments)]
    with process_group() as mesh:
        found: list[Any] = getattr(HarnessModel(Scorer(model, mesh, batch), TOKENIZER), kind)(requests)
    return found


def plain(model: Any, context: list[int], text: list[int]) -> tuple[float, bool]:
    """Sum of log-probabilities of a text after a context in one forward, and whether each token is the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *text][:-1]])).logits[0, len(context) - 1 :]
    want = torch.tensor(text)
    return -float(F.cross_entropy(logits, want, reduction="sum")), bool((logits.argmax(-1) == want).all())


def random_model(block: str) -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(tiny(block, vocabulary=257, tied_head=False, initializer_std=0.3)).double().eval()


@harness
@pytest.mark.parametrize("block", ["lmm", "mag", "mac", "mal", "transformer", "lmm-deltanet"])
def test_a_loglikelihood_is_the_sum_of_the_models_log_probabilities(block: str) -> None:
    model = random_model(block)
    pairs = [("A man went", " home"), ("x", "y"), ("", "no context"), ("so long" * 20, " ünï"), ("A man went ", "out")]
    found = answers(model, "loglikelihood", *pairs, ("b", ""))
    alone = [answers(model, "loglikelihood", pair)[0] for pair in pairs]
    for (context, text), (total, greedy), by_itself in zip(pairs, found, alone, strict=False):
        space = " " * context.endswith(" ")  # at the end of a context: it belongs to what follows
        wanted = plain(model, list(context.rstrip().encode()) or [END], list((space + text).encode()))
        assert total == pytest.approx(wanted[0], rel=1e-12) and greedy == wanted[1]
        assert by_itself[0] == pytest.approx(total, rel=1e-12)
    assert found[-1] == (0.0, True)


@harness
def test_greedy_is_what_the_model_would_write() -> None:
    pairs = [("x:", " a"), ("x:", " b"), ("x:", "a"), ("is:", " "), ("x:", " ab")]
    assert [greedy for _, greedy in answers(knowing("mag"), "loglikelihood", *pairs)] == [
        True,
        False,
        False,
        True,
        False,
    ]


@harness
@pytest.mark.parametrize("block", ["lmm", "mac"])
def test_a_whole_text_is_one_pass_whatever_its_length_and_knows_no_other(block: str) -> None:
    model = random_model(block)
    texts = ["x" * 40, "".join(chr(97 + n * n % 23) for n in range(4200)), "", "end"]  # longer than a forward
    found = answers(model, "loglikelihood_rolling", *((text,) for text in texts))
    for text, total in zip(texts, found, strict=True):
        assert total == pytest.approx(plain(model, [END], list(text.encode()))[0] if text else 0.0, rel=1e-10)


@harness
def test_text_is_generated_up_to_a_stop_the_end_of_the_document_or_the_limit() -> None:
    model = random_model("mag")
    with torch.no_grad():
        model.get_parameter("head.weight")[END] = 0  # never the likeliest
    greedy = sample_text(model, TOKENIZER, "A man", 12, Sampler(0.0, vocabulary=257))[len("A man") :]
    assert len(greedy) > 3

    def made(context: str, **options: Any) -> str:
        (text,) = answers(model, "generate_until", (context, options))
        return str(text)

    assert made("A man", until=[], max_gen_toks=12) == greedy
    stop = greedy[2]
    assert made("A man", until=["never written", stop], max_gen_toks=12) == greedy[: greedy.index(stop)]
    assert made("A man", until=stop, max_gen_toks=12) == greedy[: greedy.index(stop)]
    sampled = made("A man", until=[], max_gen_toks=12, do_sample=True, temperature=5.0)
    assert sampled != greedy and sampled == made("A man", until=[], max_gen_toks=12, do_sample=True, temperature=5.0)
    assert made("", until=[], max_gen_toks=3) == sample_of_end(model, 3)
    ending = knowing("mag")
    with torch.no_grad():
        ending.get_parameter("head.weight")[END] = ending.get_parameter("embedding.weight")[ord("a")]
    assert answers(ending, "generate_until", ("x:", {"until": []})) == [" a"]


def sample_of_end(model: Any, count: int) -> str:
    """Greedy text after the end of a document, token by token."""
    tokens = [END]
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return TOKENIZER.decode(tokens[1:])


TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "pages": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, higher_is_better: false}
  - {metric: byte_perplexity, higher_is_better: false}
""",
    "written": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "never"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
DOCUMENTS = [{"question": f"{n} and {n} is", "choices": [str(k) for k in range(4)], "answer": n % 4} for n in range(12)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of YAML tasks on a JSON file, as a user would write them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        where = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        where += f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        (folder / f"{name}.yaml").write_text(where + text)
    (folder / "both.yaml").write_text("group: both\ntask: [choice, pages]\n")
    (folder / "far.yaml").write_text(f"task: far\ndataset_path: nobody/nothing\ntest_split: test\n{TASKS['choice']}")
    farther = "task: farther\ndataset_path: nobody/else\ndataset_name: part\ntest_split: test\n"
    (folder / "farther.yaml").write_text(farther + TASKS["choice"])
    (folder / "bad.yaml").write_text(f"task: bad\ndataset_path: json\ntest_split: none\n{TASKS['choice']}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(config(tmp_path_factory.mktemp("run") / "runs"))


@harness
def test_local_tasks_are_evaluated_offline_with_the_harness_own_metrics(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "f.json"
    options = ["--tasks", "both,written", "--include-path", str(tasks), "--json", str(file)]
    before = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    assert main(["evaluate", str(checkpoint), "--task", "harness", *options]) == 0
    assert {name: value for name, value in os.environ.items() if name.startswith("HF_")} == before
    result = json.loads(file.read_text())
    found = result["harness"]
    model, _ = load_checked(find(str(checkpoint), []))
    right, total, size = 0, 0.0, 0
    for document in DOCUMENTS:
        context = list(f"Question: {document['question']}\nAnswer:".encode())
        sums = [plain(model, context, list(f" {choice}".encode()))[0] for choice in document["choices"]]
        right += max(range(4), key=sums.__getitem__) == document["answer"]
        total += plain(model, [END], list(document["question"].encode()))[0]
        size += len(document["question"])
    assert found["choice"]["acc"] == pytest.approx(right / 12) and 0 < found["choice"]["acc_stderr"] < 0.2
    assert found["pages"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["written"]["exact_match"] == 0
    assert all(found[name]["samples"] == 12 for name in TASKS)
    assert result["settings"]["lm_eval"] and result["step"] == 10
    out = capsys.readouterr().out
    assert f"{found['pages']['bits_per_byte']:.4f}" in out and f"{found['choice']['acc']:.4f} ±" in out


@harness
def test_a_limit_and_solved_examples_can_be_given(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    found = []
    for options in (["--limit", "5"], ["--limit", "5", "--fewshot", "2"]):
        file = tmp_path / "f.json"
        options += ["--tasks", "choice", "--include-path", str(tasks), "--json", str(file)]
        assert main(["evaluate", str(checkpoint), "--task", "harness", *options]) == 0
        found.append(json.loads(file.read_text()))
    assert [f["harness"]["choice"]["samples"] for f in found] == [5, 5]
    assert found[1]["settings"] == found[0]["settings"] | {"fewshot": 2}


@harness
def test_what_is_not_at_hand_is_named_with_how_to_bring_it(
    checkpoint: Path, tasks: Path, tmp_path: Path, capsys: Capture
) -> None:
    def refused(*options: str) -> str:
        capsys.readouterr()
        assert main(["evaluate", str(checkpoint), "--task", "harness", *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    include = ["--include-path", str(tasks)]
    error = refused("--tasks", "far,choice,farther", *include)
    assert "far ('nobody/nothing'); farther ('nobody/else', 'part')" in error and "set HF_HOME" in error
    assert "load_dataset('nobody/nothing'); load_dataset('nobody/else', 'part')" in error
    assert "the task bad cannot be loaded" in refused("--tasks", "bad", *include)
    assert "names no task" in refused("--tasks", ", ")
    assert "at least 1" in refused("--limit", "0")
    assert "at least 0" in refused("--fewshot", "-1")
    assert "no such folder" in refused("--include-path", str(tmp_path / "none"))


@harness
def test_the_papers_tasks_are_the_harness_own() -> None:
    with offline():
        manager = manager_of(list(PAPER), None)
        assert [name for name in PAPER if name not in manager.task_index] == []
        with pytest.raises(UserError, match="no task 'arc_eazy'; did you mean arc_easy"):
            load(["arc_eazy"], manager)
    assert names_of("choice, paper,piqa") == ["choice", *PAPER]


def test_several_processes_are_refused() -> None:
    context, options = (SimpleNamespace(mesh=Mesh(0, 2)), SimpleNamespace())
    with pytest.raises(UserError, match="one process, not on 2"):
        check(context, options)  # type: ignore[arg-type]


def test_without_the_harness_the_extra_is_named(
    checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(checkpoint), "--task", "harness"]) == 2
    captured = capsys.readouterr()
    assert "pip install 'titans-train[harness]'" in captured.err and captured.out == ""
