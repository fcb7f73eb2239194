/* Nothing: no program of ours meets a POSIX type. */
