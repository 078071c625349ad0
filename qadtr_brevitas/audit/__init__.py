"""The audit that tells a defense from a mirage: checks G1 to G19, each with its numbers and what they mean."""

from qadtr_brevitas.audit.finding import AuditReport as AuditReport
from qadtr_brevitas.audit.finding import Finding as Finding
from qadtr_brevitas.audit.finding import PrecisionAudit as PrecisionAudit
from qadtr_brevitas.audit.run import audit as audit
