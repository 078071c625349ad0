"""The audit of an evaluation: 22 checks that tell robustness from an attack that failed, each with its numbers."""

from qadtr_brevitas.auditing.finding import AuditReport as AuditReport
from qadtr_brevitas.auditing.finding import Finding as Finding
from qadtr_brevitas.auditing.finding import PrecisionAudit as PrecisionAudit
from qadtr_brevitas.auditing.run import audit as audit
