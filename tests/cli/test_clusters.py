"""What the commands about clusters refuse; tests/interop/test_cluster.py has clusters."""

from pathlib import Path

from tests.cli.conftest import Command


def test_what_cannot_be_replicated_is_refused(
    command: Command, image: Path, plain_image: Path, key_file: Path, tmp_path: Path
) -> None:
    with_key = "--key-file", key_file
    assert command("anon", "create", image, *with_key).code == 0
    here = "--address", "127.0.0.1:1"
    command("cluster", "init", image, *here, *with_key).fails(9, "anonymisation table")
    assert command("cluster", "init", plain_image, *here).code == 0
    command("cluster", "init", plain_image, *here).fails(9, "belongs to a cluster already")
    command("disk", "create", plain_image, "more", "8M").fails(9, "belongs to a cluster")
    command("serve", plain_image, "--listen", f"unix:{tmp_path}/s").fails(9, "belongs to a cluster")
    command("cluster", "init", plain_image, "--address", "nowhere").fails(2, "is not HOST:PORT")
    command("cluster", "transfer", plain_image).fails(8, "no server listens")
    command("cluster", "join", plain_image, "--ticket", tmp_path / "none").fails(2, "no such file")
    assert command("cluster", "status", plain_image, "--json").json["role"] == "at rest"
