"""The README.md of an exported folder."""

from __future__ import annotations

from typing import Any

from titans_train.models import LanguageModel

_TEXT = """# {run}, step {step:,}

A {block} language model of titans-train: {parameters:,} parameters ({dtype}), {layers} layers, width {width}, trained
on {tokens:,} tokens.

| file | content |
|---|---|
| `model.safetensors` | every parameter, whole, by its name in `titans_train.models.LanguageModel` |
| `model.json` | the architecture: the fields of `titans_train.shape.ModelShape` |
| `config.yaml` | the config of the run, every default written out |
| {tokenizer_file} | {tokenizer} |
| `export.json` | step, tokens, dtype, and size and sha256 of every other file |

Nothing here is a pickle: safetensors, JSON and YAML.

```bash
python -m titans_train inspect .                        # what is inside, parameter by parameter
python -m titans_train generate . --prompt "Once"
python -m titans_train evaluate . --data prepared/folder
```

```python
import json
from safetensors.torch import load_file
from titans_train.models import LanguageModel
from titans_train.shape import ModelShape

model = LanguageModel(ModelShape.from_dict(json.load(open("model.json"))))
model.load_state_dict(load_file("model.safetensors"))
logits = model.eval()(tokens).logits  # tokens [B, L] int64 -> [B, L, {vocabulary}]
```
"""


def readme(about: dict[str, Any], model: LanguageModel) -> str:
    """`about`: the entries of export.json."""
    shape, entry = model.shape, about["tokenizer"]
    if entry is None:
        tokenizer = "none: the model was trained on a synthetic task"
    elif entry["file"] is None:
        tokenizer = f"none: a token is a byte of UTF-8, {entry['end_of_document']} ends a document"
    else:
        tokenizer = f"{entry['kind']} tokenizer, {entry['vocabulary']:,} tokens, {entry['end_of_document']} ends a text"
    return _TEXT.format(
        run=about["run"], step=about["step"], tokens=about["tokens"], dtype=about["dtype"], block=shape.block,
        parameters=sum(p.numel() for p in model.parameters()), layers=shape.layers, width=shape.width,
        tokenizer_file=f"`{entry['file']['name']}`" if entry and entry["file"] else "(no tokenizer file)",
        tokenizer=tokenizer, vocabulary=shape.vocabulary,
    )  # fmt: skip
