"""Markdown tables, code blocks and numbers."""


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def number(value):
    return f"{value:,}" if isinstance(value, int) else str(value)


def spent(cpu):
    """Formats CPU by process in one line, without negligible values."""
    return ", ".join(f"{name} {value}" for name, value in cpu.items() if value >= 0.05)


def code(*lines):
    return "\n".join(["```", *dict.fromkeys(lines), "```"])


def rounds(result):
    return " ".join(number(rps) for rps in result["rps_rounds"])
