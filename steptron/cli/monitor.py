"""`steptron monitor …`: report, live page, metrics server, SQL, replay and W&B workspace.

report RUN_DIR          run folder → monitor/dashboard/report.py → report.html
serve --run RUN_DIR     run folder → monitor/dashboard/live.py → a web page
serve [--bind …]        frames of ranks → monitor/server → Parquet
query RUN_DIR "SQL"     run folder or server → rows
replay RUN_DIR          run folder → monitor/detect/replay.py
workspace RUN_DIR       run folder → monitor/dashboard/workspace.py → W&B
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLE_SQL = "SELECT step, layer, max(activation_rms) FROM layer_expert GROUP BY ALL ORDER BY ALL"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command, with one sub-command per view."""
    parser = subparsers.add_parser(
        "monitor",
        help="watch runs: report, live page, metrics server, SQL, replay",
        description="Watch runs: report, live page, metrics server, SQL, replay, W&B workspace.",
    )
    views = parser.add_subparsers(dest="view", required=True, metavar="VIEW", title="views")
    report = views.add_parser(
        "report",
        help="write RUN_DIR/report.html",
        description="Write the run's report: one file that needs no network. It works during a run and after its end.",
        epilog="example: steptron monitor report runs/demo",
    )
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder, such as runs/demo")
    _add_serve(views)
    query = views.add_parser(
        "query",
        help="SQL over a run's metrics",
        description="Run one SELECT over the tables of a run's metrics: "
        "run, layer, layer_expert, parameter, rank and others.",
        epilog=f'example: steptron monitor query runs/demo "{EXAMPLE_SQL}"',
    )
    query.add_argument(
        "source", metavar="RUN_DIR|grpc://HOST:PORT", help="a run's folder (or its URL), or a metrics server"
    )
    query.add_argument("sql", metavar="SQL", help="one SELECT in DuckDB's SQL; with RUN_DIR also `SHOW TABLES`")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_const", dest="form", const="csv", default="table", help="print CSV")
    form.add_argument("--json", action="store_const", dest="form", const="json", help="print JSON, one row per line")
    query.add_argument("--run", metavar="NAME", default="", help="with a server: the name of the run")
    query.add_argument("--token-file", metavar="FILE", default="", help="with a server: the file with its token")
    query.add_argument("--tls-ca", metavar="FILE", default="", help="with grpc+tls://: the certificate to trust, PEM")
    replay = views.add_parser(
        "replay",
        help="repeat a run's decisions from its stored metrics",
        description="Run the detectors over the stored metrics again, and compare the decisions with the ledger.",
        epilog="example: steptron monitor replay runs/demo",
    )
    replay.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder")
    workspace = views.add_parser(
        "workspace",
        help="create a W&B workspace for the run's project",
        description="Print the definition of a W&B workspace with panels for everything that a run logs, "
        "or save it in W&B.",
        epilog="example: steptron monitor workspace runs/demo --save",
    )
    workspace.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder")
    workspace.add_argument("--save", action="store_true", help="save it in the account that wandb is logged in to")


def _add_serve(views: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `monitor serve`, which is either a live page or a metrics server."""
    serve = views.add_parser(
        "serve",
        help="serve the live page of a run (--run), or the metrics server of a cluster",
        description="With --run: serve a web page of the run that stays up to date. Without: serve as the metrics "
        "server that ranks send to (monitor.server.addresses in the recipe); it stores metrics in DIR/RUN/metrics.",
        epilog="examples: steptron monitor serve --run runs/demo · "
        "steptron monitor serve --bind 0.0.0.0:8890 --store /shared/runs --token-file token --tls-cert cert.pem "
        "--tls-key key.pem",
    )
    serve.add_argument("--run", metavar="RUN_DIR", type=Path, help="serve the live page of this run")
    serve.add_argument("--port", type=int, default=8891, help="port of the live page on 127.0.0.1 (default: 8891)")
    server = serve.add_argument_group("metrics server")
    server.add_argument(
        "--bind", metavar="HOST:PORT", default="127.0.0.1:8890", help="address (default: 127.0.0.1:8890)"
    )
    server.add_argument(
        "--store", metavar="DIR", default="runs", help="folder of run folders, or its URL (default: runs)"
    )
    server.add_argument(
        "--receivers",
        metavar="N",
        type=int,
        default=2,
        help="number of receiver processes, on consecutive ports from PORT on (default: 2)",
    )
    server.add_argument("--token-file", metavar="FILE", default="", help="file with the token that clients must send")
    server.add_argument("--tls-cert", metavar="FILE", default="", help="certificate of the server, PEM")
    server.add_argument("--tls-key", metavar="FILE", default="", help="private key of the certificate, PEM")
    server.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=60.0,
        help="seconds to wait for the last ranks of a step (default: 60)",
    )
    server.add_argument(
        "--flush-every", metavar="N", type=int, default=50, help="maximum number of steps in a file (default: 50)"
    )
    server.add_argument(
        "--flush", metavar="S", type=float, default=30.0, help="seconds after which a step is written (default: 30)"
    )
    server.add_argument(
        "--log", metavar="FILE", default="", help="log of refusals and missing ranks (default: DIR/server.jsonl)"
    )


def run(args: argparse.Namespace) -> int:
    """Show the view. Returns the exit code."""
    _refuse_part_of_run(args)
    match args.view:
        case "report":
            from steptron.monitor.dashboard.report import write_report

            print(write_report(args.run_dir))
            return 0
        case "serve" if args.run is not None:
            from steptron.monitor.dashboard.live import serve

            return serve(args.run, args.port)
        case "serve":
            return _serve(args)
        case "replay":
            from steptron.monitor.detect.replay import replay

            return replay(args.run_dir)
        case "workspace":
            from steptron.monitor.dashboard.workspace import main_for

            return main_for(args.run_dir, args.save)
        case _:
            return _query(args)


def _refuse_part_of_run(args: argparse.Namespace) -> None:
    from steptron.cli.part_of_run import refuse_part_of_run

    if args.view == "serve" and args.run is not None:
        refuse_part_of_run(args.run, "monitor", "serve", "--run")
    elif args.view in ("report", "replay", "workspace"):
        refuse_part_of_run(args.run_dir, "monitor", args.view)


def _serve(args: argparse.Namespace) -> int:
    from steptron.errors import SteptronError
    from steptron.monitor.server.serve import ServerOptions, serve

    for name, least in (("receivers", 1), ("timeout", 0.0), ("flush_every", 1), ("flush", 0.0)):
        if getattr(args, name) < least:
            raise SteptronError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least {least}")
    return serve(
        ServerOptions(
            bind=args.bind,
            store=args.store,
            receivers=args.receivers,
            token_file=args.token_file,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            timeout_s=args.timeout,
            flush_every=args.flush_every,
            flush_s=args.flush,
            log=args.log,
        )
    )


def _query(args: argparse.Namespace) -> int:
    from steptron.monitor.dashboard.query import query_folder, query_server

    if args.source.startswith(("grpc://", "grpc+tls://")):
        rows = query_server(args.source, args.run, args.sql, args.token_file, args.tls_ca)
    else:
        rows = query_folder(args.source, args.sql)
    _print(rows, args.form)
    return 0


def _print(table: Any, form: str) -> None:
    """Print an Arrow table as a table for people, or as CSV or JSON for programs."""
    if form == "csv":
        import csv

        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(table.column_names)
        for batch in table.to_batches():
            lines.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        return
    if form == "json":
        for batch in table.to_batches():
            for row in batch.to_pylist():
                print(json.dumps(row, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for field in table.schema:
        numeric = str(field.type) in ("int32", "int64", "float", "double") or "int" in str(field.type)
        shown.add_column(field.name, justify="right" if numeric else "left")
    limit = 1000
    for row in table.slice(0, limit).to_pylist():
        shown.add_row(
            *(
                "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
                for value in row.values()
            )
        )
    Console().print(shown)
    if table.num_rows > limit:
        print(f"showing the first {limit} of {table.num_rows} rows; use --csv or --json for all of them")
