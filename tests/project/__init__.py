"""The project itself: docs, layout, goldens, the fuzzer's stored cases, the bench, the zoo."""
