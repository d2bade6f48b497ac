"""The table of all kinds: `python -m peft_adapters.kinds.table` rewrites its part of docs/peft.md."""

from __future__ import annotations

from pathlib import Path

from peft_adapters.kinds.refused import CONVERTIBLE, REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peft.md"
BEGIN, END = "<!-- kinds: generated -->\n", "<!-- end of kinds -->\n"

ROWS = "exact, as rank rows"
OPERATION = "exact, by an operation"
CONVERTED = "refused; converted on request"
WHOLE = "exact, in the place of parameters"
VIRTUAL = "exact, as virtual tokens"
PREFIX = "exact, as keys and values"
SERVED = {
    "BEFT": (OPERATION, "a bias"),
    "CARTRIDGE": (PREFIX, "a block of them, frozen tokens too"),
    "CPT": (VIRTUAL, "embeddings, as its projection left them"),
    "MULTITASK_PROMPT_TUNING": (VIRTUAL, "embeddings times its task's product; of one task"),
    "PREFIX_TUNING": (PREFIX, "those of every layer; what `prefix_projection` makes of its embeddings is in the file"),
    "PROMPT_TUNING": (VIRTUAL, "embeddings"),
    "P_TUNING": (VIRTUAL, "embeddings: what its encoder, MLP or LSTM, makes is in the file"),
    "IA3": (OPERATION, "factors of outputs; of inputs in `feedforward_modules`"),
    "LN_TUNING": (WHOLE, "norms"),
    "OFT": (
        OPERATION,
        "rotations of blocks of inputs; `coft`, `block_share`, both forms of Cayley's transform",
    ),
    "BOFT": (OPERATION, "rotations of blocks of inputs, of one butterfly factor; layers without a bias"),
    "ROAD": (OPERATION, "rotations of pairs of outputs; all variants"),
    "SHIRA": (OPERATION, "numbers at places of the weight, as a sparse product"),
    "TRAINABLE_TOKENS": (WHOLE, "rows of the embedding and the head, tied ones too"),
    "LORA": (ROWS, "its rank; every option above"),
    "ADALORA": (ROWS, "its rank, with the rank pattern that training left"),
    "DEFT": (ROWS, "its rank: `Q (R - Qᵀ W)`, of the base's weight when it is loaded; `relu`, `qr` and PaRa"),
    "DELORA": (ROWS, "its rank, with the norms in A"),
    "GRALORA": (ROWS, "k × r, and hybrid_r"),
    "HRA": (ROWS, "its rank: reflections of the base's weight when it is loaded"),
    "LOHA": (ROWS, "r², by the Khatri-Rao product"),
    "LOKR": (ROWS, "rank of the first matrix × rank of the second, by the Kronecker product; all decomposed forms"),
    "MISS": (ROWS, "its rank; the forms `true` and `mini`, not `bat`, whose rank is full"),
    "PVERA": (ROWS, "its rank, with its means; not `sample_at_inference`"),
    "TINYLORA": (ROWS, "its rank, with its projections saved (`save_projection`, PEFT's default); all `weight_tying`"),
    "UNILORA": (ROWS, "its rank, with its indices saved (`save_indices`)"),
    "VBLORA": (ROWS, "its rank, from logits or from the best weights alone"),
    "VERA": (ROWS, "its rank, with its projections saved (`save_projection`, PEFT's default)"),
}
"""For each supported kind: how it is served, and its form."""


def rows() -> dict[str, str]:
    """Return the table's line for each kind, in order of name."""
    lines = {kind: f"| `{kind}` | {gets} | {form} |\n" for kind, (gets, form) in SERVED.items()}
    lines |= {
        kind: f"| `{kind}` | {CONVERTED if kind in CONVERTIBLE else 'refused'} | {reason} |\n"
        for kind, reason in REFUSED.items()
    }
    return dict(sorted(lines.items()))


def table() -> str:
    """Return the table."""
    return (
        "\n| `peft_type` | what it gets | its form: of rank rows, how many; or why not |\n| --- | --- | --- |\n"
        + "".join(rows().values())
        + "\n"
    )


def main() -> None:
    """Write the table between its markers in docs/peft.md."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
