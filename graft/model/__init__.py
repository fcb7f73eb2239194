"""Values: what an operator writes (addresses, ports, endpoints, settings), what C and Python share (transports, homes),
how foreign text becomes them and is shown again. Pure.

    address.py ports.py    as text, and back; sets of ports
    endpoint.py            a named address of a host's stack
    sockaddr.py            an address as the kernel and the maps have it
    transport.py           how sockets come to the host's stack, and where one lives
    settings.py            where an installation lives, from the environment and back
    json_text.py           JSON from others, field by field
    printable.py           text from others, for a terminal

It may import errors, and nothing else of Graft's.
"""
