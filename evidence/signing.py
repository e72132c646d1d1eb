"""Signatures of a judge: ed25519, by OpenSSH's ssh-keygen.

An audit that lies in a folder is text, and whoever made the folder can type it. So `records verify` counts an
audit that it runs itself in this call, or one that carries the signature of the judge's key:

    ssh-keygen -t ed25519 -f judge  # once; `judge` stays with the judge, judge.pub may be shown
    python -m records verify DIR --audit now --judge-key judge  # audits, signs, keeps DIR/audit.json
    python -m records verify DIR --judge-key judge.pub  # anyone: counts it, if they trust that key

ssh-keygen is used because git signs commits with it too: it is there where git is, is kept by others, and
adds no Python package. A keyed hash of the standard library would convince nobody but the judge himself.
"""

import json
import os
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

from common import files
from common.errors import UserError

NAMESPACE, PRINCIPAL = "speedrun-audit", "judge"
KEY = "SPEEDRUN_JUDGE_KEY"  # variable: the key file where no option names one
FIELD = "signature"
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"


def key_file(option: str | None) -> Path | None:
    """The judge's key: the option's, else that of the environment, else None. UserError if it is not
    there."""
    name = option or os.environ.get(KEY)
    if not name:
        return None
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--judge-key {name}: no such file; make one with `ssh-keygen -t ed25519 -f {name}`")
    return path


def run(words: list[str], data: bytes) -> bytes:
    """Output of ssh-keygen. UserError with its last line; it never asks for a password."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UserError("ssh-keygen is not installed: signatures cannot be made or checked (OpenSSH 8.1 or "
                        "later)")
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")} | {
        "LC_ALL": "C", "SSH_ASKPASS_REQUIRE": "never"}
    try:
        done = subprocess.run([program, *words], input=data, capture_output=True, timeout=30, env=env,
                              start_new_session=True)  # no terminal to ask on
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"ssh-keygen cannot be run ({error})") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise UserError(f"ssh-keygen: {(said or ['it failed'])[-1]:.200}")
    return done.stdout


def public(key: Path) -> str:
    """The public half of a key file, private or public: `ssh-ed25519 AAAA...`. UserError for any other
    kind."""
    try:
        text = key.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{key}: {error.strerror}") from None
    if not text.startswith("ssh-"):
        text = run(["-y", "-P", "", "-f", str(key)], b"").decode(errors="replace")
    words = text.split()
    if len(words) < 2 or words[0] != "ssh-ed25519":
        raise UserError(f"{key}: no ed25519 key; make one with `ssh-keygen -t ed25519 -f FILE`")
    return " ".join(words[:2])


def message(content: dict) -> bytes:
    """The bytes that are signed: the content without its signature, as canonical JSON."""
    return json.dumps({k: v for k, v in content.items() if k != FIELD}, sort_keys=True).encode()


def signed(content: dict, key: Path) -> dict:
    """The content with the signature of a private key in it, on one line: texts of kept JSON have one."""
    armour = run(["-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(key)], message(content)).decode()
    return {**content, FIELD: "".join(armour.split("\n")[1:-2])}


def valid(content: dict, key: Path) -> bool:
    """Did this key (private, or its public half) sign this content?"""
    body = content.get(FIELD)
    if not isinstance(body, str):
        return False
    armour = "\n".join([BEGIN, *textwrap.wrap(body, 70), END, ""])
    with tempfile.TemporaryDirectory() as scratch:
        files.write(Path(scratch) / "signers", f'{PRINCIPAL} namespaces="{NAMESPACE}" {public(key)}\n')
        files.write(Path(scratch) / "signature", armour)
        try:
            run(["-q", "-Y", "verify", "-n", NAMESPACE, "-I", PRINCIPAL, "-f", f"{scratch}/signers", "-s",
                 f"{scratch}/signature"], message(content))
        except UserError as error:
            if str(error).startswith("ssh-keygen is not installed"):
                raise
            return False
    return True
