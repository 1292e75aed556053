/*
 * qipsec: what an SA of charon may ask for that ADD does not carry.
 *
 * scripts/charon-plugin.sh defines QI_SA_<field> for each field of
 * kernel_ipsec_add_sa_t that not every supported version has, and builds no plugin
 * for a version with a field that it does not know. This file calls nothing, so
 * that scripts/plugin-check.sh can run it for every version.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

/* QI_SA_seq, the acquire that an SA answers, is neither sent nor refused: charon
 * sets it for every SA of a trap, and the kernel finds that acquire by addresses
 * and reqid as well, as it does for older versions. Only SAs per CPU need it. */
const char *qi_not_carried(kernel_ipsec_add_sa_t *data)
{
#ifdef QI_SA_cpu
	if (data->cpu != CPU_ID_MAX)
	{
		return "it is one of several SAs per CPU, which Q-IPsec does not support";
	}
#endif
#ifdef QI_SA_iptfs_dont_frag
	if (data->mode == MODE_IPTFS || data->iptfs_dont_frag)
	{
		return "its mode is IP-TFS, which Q-IPsec does not support";
	}
#endif
#ifdef QI_SA_forward_icmp
	if (data->forward_icmp)
	{
		return "it is to forward ICMP errors (icmp = yes), which Q-IPsec does not "
			   "support";
	}
#endif
	return NULL;
}
