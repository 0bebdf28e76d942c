"""The demo model: same bytes everywhere, loadable by transformers, not degenerate."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from cluster.demo_model import MARKER, SPECIAL_TOKENS, VOCAB_SIZE, ensure_demo_model
from cluster.demo_template import MARKERS
from contracts.errors import ConfigurationError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_are_the_same_bytes_even_in_another_process(demo: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.demo_model import ensure_demo_model;"
        "ensure_demo_model(Path(sys.argv[1]));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "other")],
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7"},
        timeout=60,
    )
    assert contents(tmp_path / "other") == contents(demo)


def test_a_second_call_builds_nothing(demo: Path) -> None:
    before = (demo / "model.safetensors").stat()
    assert ensure_demo_model(demo) == demo
    after = (demo / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_older_recipe_is_rebuilt(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / MARKER).write_text('{"recipe": 0}')
    (folder / "left-over").write_text("x")
    assert contents(ensure_demo_model(folder)) == contents(demo)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds no demo model"):
        ensure_demo_model(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_many_callers_at_once_and_nothing_left_behind(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ensure_demo_model, [folder] * 8)) == {folder}
    assert contents(folder) == contents(demo)
    assert {path.name for path in tmp_path.iterdir()} == {"shared", ".shared.lock"}


def test_tokenizer_fills_the_vocabulary_and_round_trips(demo: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    for text in ("Hello, world!", "naïve 東京 🙂 \x00", "  two  spaces\n\nand lines\t"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>user\n").ids[0] == 1


def test_markers_of_thoughts_and_calls_are_single_tokens_that_stay_in_the_text(demo: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    ids = [tokenizer.token_to_id(marker) for marker in MARKERS]
    assert ids == list(range(VOCAB_SIZE - len(MARKERS), VOCAB_SIZE))
    text = '<think>a</think><tool_call>{"name": "f"}</tool_call>'
    encoded = tokenizer.encode(text).ids
    assert set(ids) <= set(encoded)
    assert tokenizer.decode(encoded, skip_special_tokens=True) == text


USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        (
            [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER],
            {"enable_thinking": True, "tools": [], "documents": []},
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n",
        ),
        (
            [USER],
            {"enable_thinking": False, "add_generation_prompt": True},
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": "so",
                    "reasoning_content": "r",
                    "tool_calls": [CALL],
                },
                {"role": "tool", "content": "1"},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            ],
            {},
            "<|im_start|>assistant\n<think>\nr\n</think>\n\nso\n"
            '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\n1\n</tool_response>"
            "\n<tool_response>\n2\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
            '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
            '\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>\n',
        ),
        (
            [{"role": "system", "content": "s"}],
            {
                "tools": [{"type": "function", "function": {"name": "<f>"}}],
                "documents": [{"title": "t", "text": "x"}],
                "reasoning_effort": "low",
            },
            "<|im_start|>system\ns\n\nReasoning effort: low\n"
            "# Documents\n\nAnswer from these documents.\n"
            '<documents>\n{"title": "t", "text": "x"}\n</documents>\n'
            "# Tools\n\nThese functions can be called:\n"
            '<tools>\n{"type": "function", "function": {"name": "<f>"}}\n</tools>\n\n'
            "To call one, write its name and arguments as JSON between tags:\n"
            '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n',
        ),
    ],
    ids=["plain", "no-thoughts", "calls", "system-block"],
)
def test_chat_template(
    demo: Path, messages: list[dict[str, Any]], options: dict[str, Any], text: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == text


def test_the_readme_says_that_its_text_is_noise(demo: Path) -> None:
    assert "Its text is noise" in (demo / "README.md").read_text()


def test_transformers_loads_it_and_greedy_text_is_varied(demo: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    raw = Tokenizer.from_file(str(demo / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(demo)
    assert model.config.model_type == "qwen3"
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    prompts = ["Hello!", "Tell me about the sea.", "What is 2 + 2?", "Why is the sky blue?"]
    outputs: list[tuple[int, ...]] = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(text)
        assert ids == raw.encode(text).ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
            generated = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)
        outputs.append(tuple(generated[0, len(ids) :].tolist()))
        chances = torch.softmax(logits, dim=-1)
        assert chances[:3].sum() < 0.01  # an end is rarely drawn, too
        assert chances[-len(MARKERS) :].sum() < 0.01
    assert all(len(output) == 48 for output in outputs)
    assert all(len(set(output)) >= 20 for output in outputs)
    assert len({output[:4] for output in outputs}) == len(prompts)


def test_end_tokens_agree(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    generation = json.loads((demo / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert generation["eos_token_id"] == ends
    assert config["eos_token_id"] == ends[0]
