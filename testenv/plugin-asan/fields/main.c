/*
 * fields: every field that a version of strongSwan has beyond 5.9.8's is refused by
 * the plugin when an SA uses it, or is known to be harmless. Needs that version's
 * headers only. Exit: 0 if so; else 1 and what is wrong.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <stdio.h>

#include "../../../ike/charon/qipsec.h"

static kernel_ipsec_add_sa_t plain(void)
{
	return (kernel_ipsec_add_sa_t){
		.mode = MODE_TUNNEL,
#ifdef CPU_ID_MAX
		.cpu = CPU_ID_MAX,
#endif
	};
}

/** 1, and a line, if the SA is refused and should not be, or the reverse. */
static int wrong(const char *name, kernel_ipsec_add_sa_t data, bool refused)
{
	const char *why = qi_not_carried(&data);

	if (!why == !refused)
	{
		return 0;
	}
	printf("fields: %s is %s\n", name, why ?: "not refused");
	return 1;
}

int main(void)
{
	int n = wrong("a plain SA", plain(), FALSE);
	kernel_ipsec_add_sa_t data;

#ifdef QI_SA_seq
	data = plain();
	data.seq = 7;
	n += wrong("seq", data, FALSE);
#endif
#ifdef CPU_ID_MAX
	data = plain();
	data.cpu = 0;
	n += wrong("cpu", data, TRUE);
	data = plain();
	data.mode = MODE_IPTFS;
	n += wrong("IP-TFS", data, TRUE);
	data = plain();
	data.iptfs_dont_frag = TRUE;
	n += wrong("iptfs_dont_frag", data, TRUE);
#endif
#ifdef QI_SA_forward_icmp
	data = plain();
	data.forward_icmp = TRUE;
	n += wrong("forward_icmp", data, TRUE);
#endif
	data = plain();
	data.mode = MODE_TRANSPORT;
	n += wrong("transport mode", data, FALSE);
	return n != 0;
}
