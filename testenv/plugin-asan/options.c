/*
 * plugin-asan: settings of the sanitisers, which look these functions up.
 *
 * charon's printf has directives of its own; OpenSSL keeps what it once loaded.
 * ASAN_OPTIONS=fast_unwind_on_malloc=0 shows the whole way to an allocation, at
 * several times the run time.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#pragma GCC visibility push(default)

const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
	return "print_suppressions=0:detect_stack_use_after_return=1:check_printf=0";
}

const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void)
{
	return "print_stacktrace=1";
}

const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
	return "leak:libcrypto.so";
}

#pragma GCC visibility pop
