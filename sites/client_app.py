"""What a SuperNode runs inside a hospital: the site's half of a study."""

from fedmed.flower.apps import make_client_app

app = make_client_app()
