/* Empty on purpose: bcc brings the BPF header of its own version. */
