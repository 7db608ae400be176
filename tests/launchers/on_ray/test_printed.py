from pathlib import Path

from launchers.on_ray.printed import Printed

MARKER = ":job_id:01000000\n:actor_name:RayTrainWorker\n"


def test_new_whole_lines_are_taken_once_under_the_name_of_their_file(tmp_path: Path) -> None:
    logs, kept = tmp_path / "ray", tmp_path / "run" / "workers.log"
    logs.mkdir()
    printed = Printed(kept)
    printed.take(logs)
    worker, raylet = logs / "worker-1.err", logs / "raylet.err"
    worker.write_text(MARKER)
    printed.take(logs)
    assert not kept.exists()  # there is nothing but what Ray itself notes
    worker.write_text(MARKER + "one\ntw")
    raylet.write_text("bad\n")
    (logs / "gcs_server.out").write_text("Ray's own log\n")
    printed.take(logs)
    assert kept.read_text() == "--- worker-1.err\none\n--- raylet.err\nbad\n"
    printed.take(logs)
    assert kept.read_text() == "--- worker-1.err\none\n--- raylet.err\nbad\n"
    worker.write_text(MARKER + "one\ntwo without an end")
    printed.take(logs)
    printed.take(logs, ended=True)
    assert kept.read_text().endswith("bad\n--- worker-1.err\ntwo without an end\n")
