"""The files and how to start them: uv run -m nano_rl"""

import ast
import textwrap
from pathlib import Path

FILES = {  # in the order to read them
    "Lessons": "reinforce rloo remax raft grpo ppo",
    "Variants": "dr_grpo gspo cispo dapo reinforce_pp maxrl",
    "Neighbours": "distill multi_turn",
    "Before them": "sft reward_model",
    "Rewards": "gsm8k sums judge",
    "Tools": "compare",
}


def main() -> None:
    for title, names in FILES.items():
        print(title)
        for name in names.split():
            source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            idea = ast.get_docstring(ast.parse(source)).splitlines()[0]
            print(textwrap.fill(f"  {name:14}{idea}", width=79, subsequent_indent=" " * 16))
    print("\nStart one:  uv run -m nano_rl.reinforce\nIts flags:  uv run -m nano_rl.reinforce --help")


if __name__ == "__main__":
    main()
