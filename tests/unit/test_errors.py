import pickle

from minitron_megatron.errors import ConfigError


def test_an_error_survives_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(ConfigError(["steps = 0: must be at least 1", "output is missing"])))
    assert type(error) is ConfigError
    assert error.problems == ["steps = 0: must be at least 1", "output is missing"]
    assert str(error) == "steps = 0: must be at least 1\noutput is missing"
