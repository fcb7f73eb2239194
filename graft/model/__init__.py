"""Values: what an operator writes (addresses, ports, endpoints, settings), what C and Python share (transports, homes),
and untrusted text, parsed and printed. Pure.

    address.py ports.py    parsed from text, and formatted; sets of ports
    endpoint.py            a named address of a host's stack
    unix_socket.py         a path in the place of an address
    scrape_address.py      where metrics are served
    sockaddr.py            an address as the kernel and the maps have it
    transport.py           how sockets reach the host's stack, and where a socket lives
    settings.py            the paths of an installation, from the environment and back
    json_text.py           untrusted JSON, read field by field
    printable.py           untrusted text, escaped for a terminal

It may import errors, and nothing else of Graft's.
"""
