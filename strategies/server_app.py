"""What a SuperLink runs: the server's half of a study."""

from fedmed.flower.apps import drive_study, make_server_app

app = make_server_app(drive_study)
