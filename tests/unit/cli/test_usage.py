"""A command that was typed wrongly is told in a line which option is wrong, what was given, and what is allowed."""

import argparse
import os
from importlib.metadata import version

import pytest

from imagemesh_cli.console import print_table
from imagemesh_cli.parser import build_parser
from tests.support.recording_gateway import RecordingGateway
from tests.unit.cli.conftest import Run

# Options whose name says all but their default.
NAMED = [["--steps"], ["--hires-steps"], ["--dtype"], ["--pooling"]]
GENERATE = ("generate", "a fox", "-o", "fox.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*GENERATE, "--steps", "0"), "argument --steps: must be a whole number from 1, got '0'"),
        ((*GENERATE, "-n", "0"), "argument -n: must be a whole number from 1, got '0'"),
        ((*GENERATE, "-n", "two"), "argument -n: must be a whole number from 1, got 'two'"),
        ((*GENERATE, "--seed", "-1"), "argument --seed: must be a whole number from 0, got '-1'"),
        ((*GENERATE, "--size", "0x64"), "argument --size: must be WIDTHxHEIGHT in pixels, each at least 1"),
        ((*GENERATE, "--size", "64x0"), "such as 512x512, got '64x0'"),
        ((*GENERATE, "--size", "64"), "such as 512x512, got '64'"),
        ((*GENERATE, "--strength", "0"), "argument --strength: must be a number above 0, got '0'"),
        ((*GENERATE, "--guidance", "nan"), "argument --guidance: must be a finite number, got 'nan'"),
        ((*GENERATE, "--hires", "0"), "argument --hires: must be a factor above 1 such as 1.5, or WIDTHxHEIGHT"),
        ((*GENERATE, "--hires", "0x64"), "argument --hires: must be WIDTHxHEIGHT in pixels, each at least 1"),
        ((*GENERATE, "--hires", "big"), "argument --hires: must be a factor above 1 such as 1.5, or WIDTHxHEIGHT"),
        ((*GENERATE, "--hires", "2", "--hires-steps", "0"), "argument --hires-steps: must be a whole number from 1"),
        ((*GENERATE, "--hires-strength", "0"), "argument --hires-strength: must be a number above 0, got '0'"),
        ((*GENERATE, "--hires-steps", "3"), "--hires-steps must be given beside --hires, got 3"),
        ((*GENERATE, "--control-scale", "1"), "--control-scale must be given at most once for each --control (0), got"),
        (
            (*GENERATE, "--reference-scale", "1"),
            "--reference-scale must be given at most once for each --reference (0)",
        ),
        ((*GENERATE, "--mask-blur", "3"), "--mask-blur must be given beside --mask, got 3"),
        ((*GENERATE, "--keep-unmasked"), "--keep-unmasked must be given beside --mask, got True"),
        (
            ("generate", "a", "fox", "-o", "fox.png"),
            "unrecognized arguments: fox (a text of several words goes in quote",
        ),
        ((*GENERATE, "--setps", "3"), "unrecognized arguments: --setps 3; imagemesh --help tells all"),
        (("demo", "--out", __file__), "argument --out: a folder is wanted, and this is a file: "),
        ((*GENERATE, "--timeout", "0"), "argument --timeout: must be a number above 0, got '0'"),
        ((*GENERATE, "--scheduler-option", "x"), "argument --scheduler-option: must be NAME=VALUE, got 'x'"),
        (("generate", "a fox", "-o", "fox.tiff"), "must be a file name that ends in .png, .jpg, .jpeg, .webp"),
        (("generate", "a fox", "-o", "."), "a file is wanted, and this is a folder: ."),
        (("generate", "a fox", "-o", "no/fox.png"), "no such folder: no"),
        (("classify", __file__, "--top-k", "0"), "argument --top-k: must be a whole number from 1, got '0'"),
        (("classify", __file__, "--size", "0"), "argument --size: must be a whole number from 1, got '0'"),
        (("embed", __file__, "--size", "0"), "argument --size: must be a whole number from 1, got '0'"),
        (("jobs", "list", "--limit", "0"), "argument --limit: must be a whole number from 1, got '0'"),
        (("jobs", "create", "a fox", "--keep-for", "0"), "argument --keep-for: must be a number above 0, got '0'"),
        (("jobs", "create", "a fox", "--finish-within", "0"), "--finish-within: must be a number above 0, got '0'"),
        (("up", "--models", "nowhere"), "argument --models: no such folder: nowhere"),
        (("serve", "vit", "--models", f".{os.pathsep}nowhere"), "argument --models: no such folder: nowhere"),
        (("up", "--models", ""), "argument --models: must be one folder, or several joined by ':', got ''"),
        (("tune", "--size", "0x64"), "argument --size: must be WIDTHxHEIGHT in pixels, each at least 1"),
        (("export", "v", "-o", "new", "--images", "no"), "argument --images: no such file or folder: no"),
        (("quantize", "v", "-o", "new", "--images", ".", "--floor", "2"), "--floor: must be a number from 0 to 1, got"),
        (("quantize", "v", "-o", "new", "--images", ".", "--scheme", "int2"), "invalid choice: 'int2' (choose from"),
        (("distill", "v", "-o", "new", "--images", ".", "--layers", "0"), "--layers: must be a whole number from 1"),
        (("serve", "vae", "--set", "=1"), "argument --set: must be NAME=VALUE, got '=1'"),
        (("up", "--http-port", "http"), "argument --http-port: must be a whole number from 0 to 65535, got 'http'"),
    ],
)
def test_an_option_that_is_wrong_is_told(
    gateway: RecordingGateway, run: Run, arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n"), gateway.requests) == (2, "", 1, [])
    assert said in err


@pytest.mark.parametrize(
    "address", ["http://localhost:50050", "localhost", "localhost:http", ":50050", "localhost:0", "localhost:50050/"]
)
def test_a_server_that_is_no_address_is_told_what_is_wanted(
    run: Run, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    wanted = f"must be host:port such as 127.0.0.1:50050, or unix:/path, and no URL, got {address!r}"
    code, _, err = run("models", "--server", address)
    assert (code, f"argument --server: {wanted}" in err) == (2, True)
    monkeypatch.setenv("IMAGEMESH_SERVER", address)
    code, _, err = run("models")
    assert (code, f"argument --server: IMAGEMESH_SERVER {wanted}" in err) == (2, True)


def test_a_variable_that_is_no_address_disturbs_nobody_who_does_not_use_it(
    gateway: RecordingGateway, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMESH_SERVER", "http://localhost:50050")
    assert run("models", "--server", gateway.address)[0] == 0
    assert run("up", "--help")[0] == 0


@pytest.mark.parametrize(
    "arguments", [("load", "vit"), ("unload", "vit"), ("clusters",), ("vectors", "-o", "v.parquet")]
)
def test_commands_for_an_admins_key_connect_as_all_others_do(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments, "--api-key", "im_key", "--tls-authority", "nowhere.pem")
    assert (code, "nowhere.pem: No such file" in err) == (1, True)


@pytest.mark.parametrize(("arguments", "tells"), [((), "generate"), (("jobs",), "watch")])
def test_no_command_at_all_is_told_which_there_are(run: Run, arguments: tuple[str, ...], tells: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert f"    {tells}  " in err


def test_every_option_has_its_help() -> None:
    parsers = [build_parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                assert action.help, (parser.prog, action.option_strings or action.dest)
                assert not action.help.startswith("default:") or action.option_strings in NAMED, action.option_strings


def test_a_table_leaves_out_columns_without_content(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B", "C"), [("1", "", "x"), ("22", "", "")])
    assert capsys.readouterr().out == "A   C\n1   x\n22\n"


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, f"imagemesh {version('imagemesh')}\n", "")
