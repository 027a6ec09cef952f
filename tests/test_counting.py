"""The benchmark of counting: a record of the agreed form, on a few images."""

from benchmarks.counting import bench, table


def test_a_record_and_its_table():
    found = bench([1, 2], images=4, rounds=2)
    assert [(row["steps"], row["n"], len(row["plain_seconds"])) for row in found["rows"]] == [(1, 2, 2), (2, 2, 2)]
    assert all(row["ratio"] > 0 and row["spikes_per_neuron"] > 0 for row in found["rows"])
    assert {"machine", "versions", "commit", "images"} <= found.keys()
    assert "4 images of fashion-mini" in table(found)
