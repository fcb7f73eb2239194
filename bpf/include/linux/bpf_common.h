/* Nothing: bcc's own copy of the BPF header has it all. */
