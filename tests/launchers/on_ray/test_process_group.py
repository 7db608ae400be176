import threading

import psutil
import pytest

from launchers.on_ray.process_group import interface_of, listening_socket, tcp_store


def test_the_interface_is_the_one_that_has_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("::1") == "lo"
    with pytest.raises(RuntimeError, match=r"no network interface has the address 192\.0\."):
        interface_of("192.0.2.1")


def test_the_rendezvous_listens_at_the_address_of_the_node_alone() -> None:
    host = "127.0.0.2"  # of this machine, but not the usual one
    opened = listening_socket(host)
    port = opened.getsockname()[1]
    stores: dict[int, object] = {}

    def join(rank: int) -> None:
        address = f"tcp://{host}:{port}"
        stores[rank] = tcp_store(address, rank, 2, opened if rank == 0 else None)

    threads = [threading.Thread(target=join, args=[rank]) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    connections = psutil.Process().net_connections("tcp")
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == [host]
