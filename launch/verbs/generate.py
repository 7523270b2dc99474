"""python -m launch generate RUN_DIR --prompt TEXT"""

import argparse
import sys
from pathlib import Path

HELP = "continue a text with a trained model"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help="a file with the text, of any length")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    import torch

    from trainer.generate import Sampling, generate, load_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, step = load_run(args.run, device)
    prompt = args.prompt if args.prompt is not None else args.prompt_file.read_text()
    print(f"[{args.run}, step {step}]", file=sys.stderr)
    text_of = tokenizer.decode_stream()
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    for token in generate(model, tokenizer.encode(prompt).tolist(), args.max_tokens, sampling):
        print(text_of(token), end="", flush=True)
    print()
    return 0
