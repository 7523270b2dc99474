"""The trainings of a comparison as sections of its page: losses by rate, position, distance."""

from collections.abc import Iterator
from statistics import median

from launch.compare.results import Results, Runs, TrainingRecord, best_runs, by_rate, typical
from launch.page import table


def task_sections(results: Results) -> Iterator[str]:
    """Lines of Markdown; of a mixer's runs the typical one stands for all but its loss."""
    for task, runs in results.tasks.items():
        if not runs:
            continue
        finals = [typical(same).final for same in runs.values()]
        yield from (f"## Task: {task}", "")
        yield from _outcomes(results, task, runs)
        yield from _rates(runs)
        if all(final["by_distance"] for final in finals):
            yield from _distances(runs)
        else:
            yield from _positions(runs)
        if baselines := finals[0]["baselines"]:
            counted = ", ".join(f"{name} {b['loss']:.4f}" for name, b in baselines.items())
            yield from (f"For comparison, counted on the training split: {counted}.", "")


def _outcomes(results: Results, task: str, runs: Runs) -> Iterator[str]:
    chosen = [typical(same) for same in runs.values()]
    settings = results.settings
    losses, shares = settings.published.get(task, {}), settings.published_accuracy.get(task, {})
    scores = settings.published_score.get(task, {})
    frames = results.config.model.of_frames
    unit = "held-out squared error of actions" if frames else "held-out loss, nats per token"
    rows = [(unit, [_losses(best_runs(r)) for r in runs.values()])]
    if losses:
        rows.append(("published", [f"{losses[n]:.3f}" if n in losses else "" for n in runs]))
    if equal := results.in_equal_time.get(task):
        seconds = min(run.seconds[-1] for run in equal.values())
        asks = all(run.asks for run in chosen)
        told = {n: _accuracies([r]) if asks else f"{r.final_loss:.4f}" for n, r in equal.items()}
        shown = [told.get(n, "lost") for n in runs]
        rows.append((f"in {seconds:,.0f} s, schedule to its end, first seed", shown))
        steps = [f"{equal[n].tokens[-1]:,}" if n in equal else "" for n in runs]
        rows.append(("tokens trained on in that time", steps))
    lowest = [min(point.loss for point in run.held_out) for run in chosen]
    rows.append(("lowest on the way", [f"{loss:.4f}" for loss in lowest]))
    if all("rollouts" in run.final for run in chosen):
        played = [_scores(best_runs(same)) for same in runs.values()]
        rows.append(("normalised score of rollouts", played))
        beside = [run.final["rollouts"].get("policy_score") for run in chosen]
        if None not in beside:
            rows.append(("the policy of the data, without noise", [f"{x:.1f}" for x in beside]))
    if scores:
        rows.append(("published", [f"{scores[n]:.1f}" if n in scores else "" for n in runs]))
    if not frames:
        rows.append(("accuracy", [_accuracies(best_runs(same)) for same in runs.values()]))
    if shares:
        rows.append(("published", [f"{shares[n]:.1%}" if n in shares else "" for n in runs]))
    rows += [
        ("learning rate", [f"{run.learning_rate:g}" for run in chosen]),
        ("tokens trained on", [f"{run.tokens[-1]:,}" for run in chosen]),
        ("seconds of training steps", [f"{run.seconds[-1]:,.0f}" for run in chosen]),
    ]
    yield from table("", runs, rows)
    others = [f"{name} {loss:g}" for name, loss in losses.items() if name not in runs]
    others += [f"{name} {share:.1%}" for name, share in shares.items() if name not in runs]
    others += [f"{name} {score:.1f}" for name, score in scores.items() if name not in runs]
    if others:
        yield from (f"Published besides: {', '.join(others)}.", "")


def _accuracies(runs: list[TrainingRecord]) -> str:
    """The median of some seeds, and their spread."""
    shares = sorted(run.final["accuracy"] for run in runs)
    spread = f" ({shares[0]:.1%} to {shares[-1]:.1%})" if len(shares) > 1 else ""
    return f"{median(shares):.1%}{spread}"


def _scores(runs: list[TrainingRecord]) -> str:
    """The median of some seeds, and their spread."""
    scores = sorted(run.final["rollouts"]["score"] for run in runs)
    spread = f" ({scores[0]:.1f} to {scores[-1]:.1f})" if len(scores) > 1 else ""
    return f"{median(scores):.1f}{spread}"


def _rates(runs: Runs) -> list[str]:
    tried = [by_rate(same) for same in runs.values()]
    rates = sorted({rate for rates_of in tried for rate in rates_of})
    if len(rates) == 1:
        return []
    asks = all(run.asks for same in runs.values() for run in same)
    shown, judged = (_accuracies, "accuracy") if asks else (_losses, "held-out loss")
    rows = [(f"{r:g}", [shown(t[r]) if r in t else "" for t in tried]) for r in rates]
    return table(f"{judged} at a learning rate of", runs, rows)


def _distances(runs: Runs) -> list[str]:
    columns = [typical(same).final["by_distance"] for same in runs.values()]
    rows = [
        (f"{row[0][0]:,} tokens", [f"{accuracy:.1%}" for _, _, accuracy in row])
        for row in zip(*columns, strict=True)
    ]
    return table("accuracy at a distance of", runs, rows)


def _positions(runs: Runs) -> Iterator[str]:
    yield from _by_position("loss at positions", "by_position", "{:.4f}", runs)
    if all(typical(same).final.get("accuracy_by_position") for same in runs.values()):
        name = "accuracy_by_position"
        yield from _by_position("accuracy at positions", name, "{:.1%}", runs)


def _by_position(title: str, name: str, form: str, runs: Runs) -> list[str]:
    columns = [typical(same).final[name] for same in runs.values()]
    rows = [
        (f"{row[0][0]:,} to {row[0][1] - 1:,}", [form.format(value) for _, _, value in row])
        for row in zip(*columns, strict=True)
    ]
    return table(title, runs, rows)


def _losses(runs: list[TrainingRecord]) -> str:
    """The median of some seeds, and their spread."""
    losses = sorted(run.final_loss for run in runs)
    spread = f" ({losses[0]:.4f} to {losses[-1]:.4f})" if len(losses) > 1 else ""
    return f"{median(losses):.4f}{spread}"
